"""What generation takes is estimated as the code takes it: counted tensor by tensor, on a tiny model."""

import json
import weakref

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tasks.engines.shared_prompts.generation import SharedPrompts
from tests.conftest import settings_of
from tests.engines.test_shared_prompts import options
from tests.prefix_models import write_policy
from tests.training.resources.test_needs import SMALL, asked
from training.resources import gpu_memory, needs
from training.resources.sizes import sizes_of
from training.settings import TrainSettings


class Peak(TorchDispatchMode):
    """The most bytes at a time of all tensors that are made within it; `there` are older ones."""

    def __init__(self, there):
        super().__init__()
        self.now = self.most = 0
        self.held = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place, size = storage._cdata, storage.nbytes()
                if place not in self.held:
                    self.held.add(place)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.freed, place, size)
        return made

    def freed(self, place, size):
        self.held.discard(place)
        self.now -= size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy") / "policy", layers=8)


def measured(folder, questions, group, length, shared):
    """The peak in bytes, and the tokens of the prompt and of its image."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A" * 180}]}],
        add_generation_prompt=True,
    )
    image, copies = Image.new("RGB", (84, 84)), questions * (1 if shared else group)
    inputs = dict(processor(text=[text] * copies, images=[[image]] * copies, return_tensors="pt"))
    config = options(max_new_tokens=length, do_sample=True, suppress_tokens=[2, 3, 4, 5, 6])
    prompts = [row // group for row in range(questions * group)]
    there = [*model.parameters(), *model.buffers(), *inputs.values()]
    with torch.no_grad(), Peak(there) as peak:
        if shared:
            ours = SharedPrompts(model, pytest.fail, check=False)
            ours.generate(inputs, prompts, generation_config=config)
        else:
            model.generate(**inputs, generation_config=config)
    ids = inputs["input_ids"][0]
    return peak.most, (len(ids), int((ids == model.config.image_token_id).sum()))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("questions", "group", "length"), [(2, 8, 40), (4, 2, 2)])
def test_the_estimate_is_near_what_tensors_take(folder, questions, group, length, shared):
    """Where keys and values take the most, and where reading the prompts does."""
    taken, prompt = measured(folder, questions, group, length, shared)
    settings = settings_of(
        TrainSettings, dtype="float32", num_generations=group, questions_per_step=questions,
        micro_batch_size=questions * group, max_completion_length=length, shared_prefix=shared,
        watch_every=0,
    )  # fmt: skip
    training = needs.Asked(folder, prompt, settings, needs.Options(), needs.Place(cuda=False))
    assert training.branches == shared
    told = gpu_memory.of_gpu(training).generation
    assert told == pytest.approx(taken, rel=0.1)


def test_generation_counts_a_prompt_once_a_group_where_completions_branch_off():
    def generation(**given) -> float:
        return gpu_memory.of_gpu(asked(**{"watch_every": 0, "lora_rank": 8, **given})).generation

    token = 2 * sizes_of(SMALL).cache
    # At the end: eight prompts of 700 tokens, 64 completions with a layer of theirs twice, the drawing.
    assert generation() == pytest.approx(
        8 * 700 * token + 64 * 512 * token * 37 / 36 + 24 * 64 * 151_936
    )
    # With copies reading the prompts takes more, and of it the 2,048 patches of each image.
    theirs = generation(shared_prefix=False)
    assert theirs == 64 * (700 * token + 2 * 2048 * (6 * 1280 + 3 * 3420))
    # Sharded weights generate from copies.
    assert generation(place=needs.Place(1, sharding="fsdp")) == theirs
    assert generation(supervised=True) == generation(options={"use_vllm": True}) == 0
    wider = generation(lora_rank=0) - generation()
    assert wider == pytest.approx(token * (8 * 700 + 64 * 512 * 37 / 36))
    # The room for completions doubles.
    more = generation(max_completion_length=514) - generation(max_completion_length=513)
    assert more == pytest.approx(64 * 512 * token * 37 / 36)


def test_keys_and_values_are_in_float32_where_weights_are(folder):
    """In mixed precision, as full fine-tuning in 16 bits is."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer = model(input_ids=torch.tensor([[9, 9]]), use_cache=True).past_key_values.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.float32


def test_the_answers_to_val_images_are_generated_with_a_prompt_each():
    of = {"micro_batch_size": 8, "questions_per_step": 1, "shared_prefix": False}
    watched = gpu_memory.of_gpu(asked(watch_images=64, **of)).generation
    assert watched > 3 * gpu_memory.of_gpu(asked(watch_every=0, **of)).generation
    assert watched == gpu_memory.of_gpu(asked(watch_images=64, supervised=True, **of)).generation
    assert watched == 4 * gpu_memory.of_gpu(asked(watch_images=8, **of, supervised=True)).generation
    by_vllm = asked(options={"use_vllm": True}, watch_images=64, **of)
    assert gpu_memory.of_gpu(by_vllm).generation == 0


@pytest.mark.parametrize(
    ("changed", "branches"),
    [
        ({}, True),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "use_sliding_window": True,
                "sliding_window": 8,
            },
            True,
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"attn_logit_softcapping": 30.0}, False),
    ],
)
def test_an_architecture_that_cannot_share_prompts_is_known_by_its_config(
    tmp_path, changed, branches
):
    write_policy(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sizes_of(tmp_path).branches is branches
