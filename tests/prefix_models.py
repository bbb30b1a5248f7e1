"""Random vision-language models of a few thousand weights, and trainers on them.

torchrun --nproc_per_node=2 -m tests.prefix_models POLICY OUTPUT KIND...
"""

import os
import random
import sys
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.two_processes import Fixed
from training.model import tiny_policy
from training.model.sharding import reduced_each_time
from training.resources.gpu_memory import longest_prompt
from training.resources.largest_batch import try_largest
from training.shared_prefix.trainer import make_trainer

NAMES = ("rose gold-belt", "teal coral-belt", "crimson cyan-belt")
GROUP = 4


def write_policy(folder: Path, layers: int = 2) -> Path:
    """A Qwen2.5-VL of a few narrow layers, with its processor."""
    config = tiny_policy.config()
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 96, layers
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.layer_types, text.initializer_range = ["full_attention"] * layers, 0.1
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 32, 64, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = 64, [0, 1]
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    words = tiny_policy.slot_words(NAMES)
    tiny_policy.save(model, tiny_policy.processor(words, min_pixels=56 * 56), folder)
    return folder


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with prompts of several lengths and images of two sizes, no two alike."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        image = Image.new("RGB", (56, 84) if number % 2 else (56, 56))
        image.putdata(
            [
                tuple(draw.randrange(256) for _ in range(3))
                for _ in range(image.width * image.height)
            ]
        )
        text = " ".join(draw.choice(NAMES) for _ in range(1 + number % 3))
        rows.append(
            {"prompt": [{"role": "user", "content": text}], "image": image, "mcq_id": number}
        )
    return rows


def spread(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within most groups."""
    return [float(sum(map(ord, c[-1]["content"])) % 7) for c in completions]


def some_dead(completions: list[Any], mcq_id: list[int], **_: Any) -> list[float]:
    """The same, but the same for all completions of every third question."""
    found = spread(completions)
    return [0.0 if n % 3 == 0 else r for n, r in zip(mcq_id, found, strict=True)]


def trainer(
    policy: Path,
    output: Path,
    *,
    shared: bool = True,
    rows: int = 12,
    reward: Any = spread,
    peft_config: Any = None,
    tokens: int = 0,
    check: bool = True,
    model: Any = None,
    drawn: "Drawn | None" = None,
    mixed: Any = None,
    **config: Any,
) -> GRPOTrainer:
    """A trainer of either kind on the same questions, four completions of up to ten tokens each."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(policy)
    processor.tokenizer.padding_side = "left"
    model = model or AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    defaults = {
        "max_steps": 2,
        "learning_rate": 1e-4,
        "num_generations": GROUP,
        "per_device_train_batch_size": 16,
        "max_completion_length": 10,
        "seed": 3,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
    }
    made = make_trainer(
        model=model,
        shared_prefix=shared,
        tokens_per_micro_batch=tokens,
        check_first_batch=check,
        args=GRPOConfig(output_dir=str(output), **(defaults | config)),
        processing_class=processor,
        train_dataset=Dataset.from_list(questions(rows)),
        reward_funcs=reward,
        peft_config=peft_config,
        mixed=mixed,
    )
    if drawn is not None:
        drawn.into(made)
    return made


class Drawn:
    """What the first trainer generates that is given this; every other one takes it over.

    Ours and TRL's draw other random numbers. With equal completions they must train alike.
    """

    def __init__(self) -> None:
        self.turns: list[tuple[Any, torch.Tensor]] | None = None

    def into(self, one: GRPOTrainer) -> None:
        generate = one._generate_single_turn
        if self.turns is None:
            self.turns = turns = []

            def record(*args: Any, **kwargs: Any) -> Any:
                result = generate(*args, **kwargs)
                turns.append((result, torch.get_rng_state()))
                return result

            one._generate_single_turn = record
            return
        turns_left = iter(self.turns)

        def replay(*_: Any, **__: Any) -> Any:
            result, state = next(turns_left)
            torch.set_rng_state(state)  # TRL shuffles rows after generating
            return result

        one._generate_single_turn = replay


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


def told(trainer: GRPOTrainer, key: str) -> list[float]:
    """A logged figure, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def one_alive(completions: list[Any], mcq_id: list[int], **_: Any) -> list[float]:
    """No group of the first process has an advantage in the first steps."""
    found = spread(completions)
    return [r if n % 4 >= 2 or n > 8 else 0.0 for n, r in zip(mcq_id, found, strict=True)]


def none_for_the_first(completions: list[Any], mcq_id: list[int], **_: Any) -> list[float]:
    """No group of the first of two processes ever has an advantage; all of the other's have one."""
    return [float(place % GROUP) if number % 8 >= 4 else 0.0 for place, number in enumerate(mcq_id)]


def shard_out(one: GRPOTrainer) -> None:
    """Share the weights out over all processes by FSDP2, block by block, as accelerate does on GPUs.

    After every backward pass each process holds gradients of its own share alone.
    """
    for state in (PartialState(), one.accelerator.state):
        state.distributed_type = DistributedType.FSDP
    one.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert one.accelerator.is_fsdp2
    mesh = init_device_mesh("cpu", (one.accelerator.num_processes,))
    inner = one.model.model
    for block in [*inner.visual.blocks, *inner.language_model.layers, one.model]:
        fully_shard(block, mesh=mesh)
    one.accelerator.prepare_model = lambda model, **_: model
    sharded = [module for module in one.model.modules() if isinstance(module, FSDPModule)]
    backward = one.accelerator.backward

    def reduced(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        for module in sharded:
            group = module._get_fsdp_state()._fsdp_param_group
            for weight in group.fsdp_params if group else []:
                assert weight._unsharded_param.grad is None, "whole gradients are held"

    one.accelerator.backward = reduced


class Largest(TrainerCallback):
    """Takes the largest batch when training begins, as `training.grpo` does on request."""

    def __init__(self, one: GRPOTrainer):
        self.one = one

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        row = questions(6)[5]  # of three names, with the larger image
        try_largest(self.one, row, longest_prompt(self.one.processing_class, [row]))


def main() -> None:
    """Train in one of several processes in the ways named; the first process writes the weights.

    shared and stock are ours and TRL's; sharded is ours with the weights shared out; tried is ours, and
    triedstock TRL's, after the largest batch.
    """
    policy, output, kinds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    drawn = Drawn()
    for kind in kinds:
        idle = "sharded" in kinds
        given: dict[str, Any] = {"reward": none_for_the_first if idle else one_alive}
        given |= {"rows": 24, "max_steps": 3, "per_device_train_batch_size": 8}
        given |= {"gradient_accumulation_steps": 2}
        if idle:  # Adam would blow rounding up to steps of its own
            given |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        if kind == "sharded":
            with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"}):
                given |= reduced_each_time()
        kept = None if idle else drawn
        shared = "stock" not in kind
        one = trainer(policy, output / kind, shared=shared, tokens=80, drawn=kept, **given)
        if idle:  # completions of equal length, since each process takes its own time to sample
            for name in ("_generate_single_turn", "_drawn"):
                setattr(one, name, MethodType(getattr(Fixed, name), one))
        if kind == "sharded":
            shard_out(one)
        if "tried" in kind:
            one.add_callback(Largest(one))
        one.train()
        state = {
            name.removeprefix("module."): getattr(weight, "full_tensor", lambda w=weight: w)()
            for name, weight in one.model.state_dict().items()
        }
        if one.accelerator.is_main_process:
            assert not idle or one.counters.lm_tokens == 0
            torch.save(state, output / f"{kind}.pt")


if __name__ == "__main__":
    main()
