"""The command that makes the embedded policy, in short; and the policy that is shipped."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pipeline.stages.data import EMBEDDED_WEIGHTS
from tasks.tables import shards
from tests.conftest import ROOT
from training import make_base_policy
from training.data import lessons
from training.model import tiny_policy

SHIPPED = {1: "fe55df28036f2fca3af24518e20daec7865b84b054c18267641a07ed9aa14a22"}


@pytest.mark.model
def test_the_command_makes_a_policy_from_nothing_and_the_same_one_again(tmp_path):
    for name in ("one", "two"):
        subprocess.run(
            [sys.executable, "-m", "training.make_base_policy", str(tmp_path / name),
             "--seed", "5", "--steps", "2", "1"],
            cwd=ROOT, check=True,
        )  # fmt: skip
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert {tensor.dtype for tensor in weights[0].values()} == {torch.bfloat16}
    card = (tmp_path / "one" / "README.md").read_text()
    assert "--seed 5" in card
    assert "2 + 1 steps" in card
    assert "| banded | belted |" in card


def test_the_shipped_weights_are_those_that_the_pipeline_counts_as_its_version():
    digest = shards.sha256_file(tiny_policy.SHIPPED / "model.safetensors")
    assert SHIPPED[EMBEDDED_WEIGHTS] == digest, "other weights: raise EMBEDDED_WEIGHTS"


def test_the_shipped_policy_is_small_and_its_card_tells_of_its_handicap():
    files = [path for path in tiny_policy.SHIPPED.iterdir() if path.suffix != ".md"]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert not {path.suffix for path in files} - {".json", ".jinja", ".safetensors"}
    card = (tiny_policy.SHIPPED / "README.md").read_text()
    assert "careless on purpose" in card
    for word, (other, share) in lessons.CARELESS.items():
        assert f"| {word} | {other} | {100 * share:.0f} % |" in card


def test_the_embedded_policy_takes_up_further_words_and_keeps_its_own():
    policy, processor = tiny_policy.embedded(["heron", "egret"])
    own = tiny_policy.processor(make_base_policy.vocabulary()).tokenizer
    text = "<think>banded cyan.</think><answer>Drovia calpa</answer>"
    assert processor.tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert len(processor.tokenizer("heron egret")["input_ids"]) == 2
    assert policy.get_input_embeddings().weight.dtype == torch.float32
    assert len(processor.tokenizer) == policy.config.text_config.vocab_size
