"""What processes share out is saved by each, taken up again exactly, and whole in the policy."""

import os
import subprocess

import pytest

from tests.conftest import ROOT
from tests.training.test_grpo import TWO_PROCESSES, digest
from training.model import tiny_policy

pytestmark = [pytest.mark.model, pytest.mark.process]
# As `accelerate launch` with a configuration of training/recipes sets them.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def test_sharded_states_are_handed_over_and_policies_hold_whole_weights(tmp_path):
    from transformers import AutoModelForImageTextToText

    policy = tmp_path / "policy"
    tiny_policy.save(*tiny_policy.build(["beetle"], seed=3), policy)
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "tests.sharded", str(policy), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **FSDP},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    last, best, after = (tmp_path / name for name in ("last", "best", "next"))
    checkpoint = best / "checkpoints" / "checkpoint-1"
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        written = list((checkpoint / name).glob("*.distcp"))
        assert len(written) == 2, "one of each process"
        for path in written:
            assert path.samefile(best / "state" / name / path.name)
            assert path.samefile(after / "checkpoints" / "checkpoint-1" / name / path.name)
    weights = {
        "first step": [last / "best", best],
        "second step": [last, best / "last", after],
    }
    found = {
        name: {digest(folder / "model.safetensors") for folder in folders}
        for name, folders in weights.items()
    }
    assert all(len(digests) == 1 for digests in found.values()), found
    assert len({digest(policy / "model.safetensors"), *(d for f in found.values() for d in f)}) == 3
    assert AutoModelForImageTextToText.from_pretrained(best)
