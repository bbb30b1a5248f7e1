"""Other families than the default's go through the whole line: nothing knows their names.

Their images are of three shapes, as photographs are: a family that cuts images into tiles makes
different numbers of them in one batch.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig

import data_cards
from tasks import schemas, shards
from tasks.engine import Prompter, Request
from tests import families
from tests.conftest import ENGINE, ROOT, propose_arguments
from tests.test_train import arguments, cards_of, freeze
from training.grpo import with_ours
from training.loading import load_processor
from training.parts import PARTS
from training.shared_prefix import make_trainer

pytestmark = pytest.mark.model
SHAPES = ((84, 84), (84, 42), (40, 84))  # width and height in pixels
ALL = set(PARTS)
# Gemma-3's projector is a bare matrix, not a linear layer, and so has no adapter.
ADAPTED = {
    "gemma3": ALL - {"projector"},
    "qwen3_vl": ALL,
    "idefics3": ALL,
    "idefics3_untiled": ALL,
    "smolvlm": ALL,
    "llava_onevision": ALL,
    "internvl": ALL,
}


@pytest.fixture(scope="module")
def photographs(drawn_once, tmp_path_factory):
    """The `few` card's images cut to several shapes, and questions about them."""
    root = tmp_path_factory.mktemp("photographs")
    shutil.copytree(drawn_once / "split", root / "split")
    (root / "download").mkdir()
    with cards_of(drawn_once):
        rows = shards.read(drawn_once / "download", "images").to_pylist()
        for number, row in enumerate(rows):
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                cut, made = image.crop((0, 0, *SHAPES[number % len(SHAPES)])), io.BytesIO()
            cut.save(made, "PNG")
            row |= {"width": cut.width, "height": cut.height}
            row["image"] = {"bytes": made.getvalue(), "path": None}
        names = data_cards.load("few").classes
        place = shards.shard_path(root / "download", "images", 0)
        shards.write(place, rows, schemas.images(names))
        freeze(root)
    return root


@pytest.fixture(scope="module")
def told(photographs, drawn_once, tmp_path_factory):
    """What became of each family, all of them through the line in one process."""
    root = tmp_path_factory.mktemp("families")
    shutil.copytree(drawn_once / "cards", root / "cards")
    given = [of_family(name, photographs, root / name) for name in ADAPTED]
    for family in given:
        (root / family["family"]).mkdir()
    path = root / "given.json"
    path.write_text(json.dumps(given, default=str))
    done = subprocess.run(
        [sys.executable, "-m", "tests.family_line", path],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads((root / "told.json").read_text())


def of_family(name: str, made, folder) -> dict:
    """The arguments of each stage for one family."""
    engine = {
        **ENGINE,
        "backend": "tests.family_line:engine",
        "in_process": "vllm",
        "processes": 1,
        "max_new_tokens": 8,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 0,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 1,
        "cpu_kv_cache_gib": 1,
        "quantization": "",
        "lora": "",
    }
    place = type("Place", (), {"root": folder / "base"})()
    place.download, place.split = made / "download", made / "split"
    asked = {"engine": engine, "num_rollouts": 2, "max_unparsed_share": 1.0, "limit": 6}
    evaluated = {
        "card": "few",
        "download": place.download,
        "split": place.split,
        "policy": folder / "train",
        "engine": engine,
        "part": "val",
        "num_rollouts": 2,
        "num_options": 5,
        "prompt": "open",
        "shard_size": 100,
        "seed": 0,
    }
    return {
        "family": name,
        "words": ["beetle", "species"],
        "base": {
            "output": folder / "base",
            "model": folder / "model",
            "download": [place.download],
            "split": [place.split],
            "card": "few",
            "seed": 0,
            "prompt_style": "brief",
            "steps": 0,
            "batch_size": 1,
            "learning_rate": 0.0,
            "muon_learning_rate": 0.0,
            "question_share": 0.0,
            "blind_share": 0.0,
            "min_pixels": 784,
            "max_pixels": 7056,
            "dtype": "float32",
        },
        "propose": propose_arguments(place, output=folder / "propose", **asked),
        "train": arguments(
            made,
            output=folder / "train",
            base=folder / "base",
            policy=folder / "base",
            steps=2,
            micro_batch_size=8,
            lora_rank=4,
            lora_targets="vision projector language",
            learning_rate=1e-2,
            watch_every=2,
            watch_images=4,
            save_steps=2,
        ),
        "evaluate": {**evaluated, "output": folder / "evaluate"},
        "again": {
            **evaluated,
            "output": folder / "again",
            "engine": {**engine, "in_process": "transformers"},
            "modes": ["one_step"],
        },
    }


@pytest.mark.parametrize("family", ADAPTED)
def test_a_family_goes_through_the_whole_line(family, told):
    root, found = told
    folder, found = root / family, found[family]
    assert not found["error"], found["error"]
    assert shards.read(folder / "propose", "rollouts").num_rows == 6 * 2
    log = shards.read(folder / "train", "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert any(row["grad_norm"] > 0 for row in log)
    assert (folder / "train" / "adapter" / "adapter_model.safetensors").exists()
    said = found["said"].splitlines()
    assert any(line.startswith("train: images are encoded once a group") for line in said)
    assert any("agree on the first batch" in line for line in said)
    trained = next(line for line in said if "parameters are trained" in line)
    assert {part for part in PARTS if f"{part} 0 of" not in trained} == ADAPTED[family]
    fixed = any("min_pixels and max_pixels do nothing" in line for line in said)
    assert fixed == (family != "qwen3_vl")
    predictions = shards.read(folder / "evaluate", "predictions")
    assert set(predictions["mode"].to_pylist()) >= {"one_step", "majority", "two_step"}
    # By vLLM and by the trainer's own library: the very answers, with the same probability.
    by_vllm, by_transformers = (
        shards.read(folder / name, "one_step").to_pylist() for name in ("evaluate", "again")
    )
    for one, other in zip(by_vllm, by_transformers, strict=True):
        assert one["completion"] == other["completion"]
        assert one["mean_logprob"] == pytest.approx(other["mean_logprob"], abs=1e-3)


@pytest.mark.parametrize("family", ADAPTED)
def test_a_prompt_is_the_same_however_it_is_made(family, tmp_path):
    prompter = Prompter(getattr(families, family)(tmp_path / "policy", ["beetle"]))
    for shape in SHAPES:
        made = io.BytesIO()
        picture(*shape).save(made, "PNG")
        request = Request("a", made.getvalue(), "What is it?")
        asked = prompter.processor(text=[prompter(request)], images=[[request.picture]])
        assert asked["input_ids"][0] == prompter.tokens(request)


WITHOUT = """
import sys
sys.modules["num2words"] = None  # importing it fails
from pathlib import Path
from tasks.engine import Prompter
from tasks.run import StageError
from training import loading, sft
policy = Path(sys.argv[1])
base = {key: 0 for key in sft.base_policy.__annotations__ if key not in ("output", "return")}
base |= {"model": str(policy), "card": "beetles"}
for load in (Prompter, loading.load_processor, lambda policy: sft.base_policy(policy, **base)):
    try:
        load(policy)
    except StageError as error:
        print(error)
"""


def test_a_package_that_is_missing_is_named(tmp_path):
    policy = families.smolvlm(tmp_path / "policy", ["beetle"])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, policy], cwd=ROOT, capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr
    for line in said:
        assert line.startswith(f"the processor of {policy} cannot be loaded")
        assert line.endswith("`pip install num2words`.")


# Rows of pixel values of the three images, each encoded once: Idefics3 and LLaVA-OneVision have an
# image's tiles in one row, InternVL each in its own, with a thumbnail where there are two.
ROWS = {
    "gemma3": 3,
    "idefics3": 3,
    "idefics3_untiled": 3,
    "smolvlm": 3,
    "llava_onevision": 3,
    "internvl": 1 + 3 + 3,
}


@pytest.mark.parametrize("family", ROWS)
def test_with_shared_images_and_without_a_step_is_the_same(family, tmp_path, monkeypatch):
    policy = getattr(families, family)(tmp_path / "policy", ["beetle"])
    kind = type(load_processor(policy).image_processor)
    process = Mock(side_effect=kind.preprocess)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "preprocess", lambda *given, **named: process(*given, **named))
        ours, norm = one_step(policy, tmp_path / "ours", shared=True)
    assert process.call_count == len(SHAPES)
    assert one_step(policy, tmp_path / "stock", shared=False)[1] == pytest.approx(norm, rel=1e-4)
    assert norm > 0
    assert ours.counters.vision_patches == 2 * ROWS[family]  # the reference's pass, and the loss's


def one_step(policy, output, *, shared: bool):
    """The trainer after a step on an image of each shape, and the norm of its gradient."""
    processor = load_processor(policy)
    trainer = make_trainer(
        model=AutoModelForImageTextToText.from_pretrained(policy),
        shared_prefix=shared,
        mixed=lambda kind: with_ours(kind, truth_rollout=False),
        processing_class=processor,
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": text}], "image": picture(*shape)}
                for text, shape in zip(("A", "What is it?", "this or that"), SHAPES, strict=True)
            ]
        ),
        reward_funcs=lambda completions, **_: [len(c[-1]["content"]) % 5 for c in completions],
        args=GRPOConfig(
            output_dir=str(output),
            max_steps=1,
            num_generations=2,
            max_completion_length=6,
            per_device_train_batch_size=2 * len(SHAPES),
            beta=0.05,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            remove_unused_columns=False,
            shuffle_dataset=False,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},  # of the reference
        ),
    )
    trainer.train()
    return trainer, trainer.state.log_history[0]["grad_norm"]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
