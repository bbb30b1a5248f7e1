"""What other families' processors give is what engine and trainer use: tokens, tiles, sizes."""

import io
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig

from tasks.engines.base import PromptBuilder, Request
from tests import families
from tests.conftest import ROOT
from tests.prefix_models import Drawn
from tests.test_families import ADAPTED as FAMILIES
from tests.test_families import SHAPES
from training.loop.sampling import with_ours
from training.model.processors import load_processor
from training.shared_prefix.trainer import make_trainer

pytestmark = pytest.mark.model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_the_same_however_it_is_made(family, tmp_path):
    prompt_builder = PromptBuilder(getattr(families, family)(tmp_path / "policy", ["beetle"]))
    for shape in SHAPES:
        made = io.BytesIO()
        picture(*shape).save(made, "PNG")
        request = Request("a", made.getvalue(), "What is it?")
        asked = prompt_builder.processor(text=[prompt_builder(request)], images=[[request.picture]])
        assert asked["input_ids"][0] == prompt_builder.tokens(request)


WITHOUT = """
import sys
sys.modules["num2words"] = None  # importing it fails
from pathlib import Path
from tasks.engines.base import PromptBuilder
from tasks.runtime.errors import StageError
from training import adopt
from training.model import processors
from training.settings import ModelSettings
policy = Path(sys.argv[1])
base = ModelSettings(model=str(policy), min_pixels=784, max_pixels=784, dtype="float32")
loads = PromptBuilder, processors.load_processor, lambda policy: adopt.adopt(policy, settings=base)
for load in loads:
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
    drawn = Drawn()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "preprocess", lambda *given, **named: process(*given, **named))
        ours, norm = one_step(policy, tmp_path / "ours", drawn, shared=True)
    assert process.call_count == len(SHAPES)
    assert one_step(policy, tmp_path / "stock", drawn, shared=False)[1] == pytest.approx(
        norm, rel=1e-4
    )
    assert norm > 0
    assert ours.counters.vision_patches == 2 * ROWS[family]  # the reference's pass, and the loss's


def one_step(policy, output, drawn, *, shared: bool):
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
    drawn.into(trainer)
    trainer.train()
    return trainer, trainer.state.log_history[0]["grad_norm"]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)
