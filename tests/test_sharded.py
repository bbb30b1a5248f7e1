"""Checkpoints of weights and states that are shared out: going on after a kill, and in the next round."""

import json
import os
import subprocess

import pytest

from tests.conftest import ROOT
from tests.test_train import TWO_PROCESSES, arguments, curve, digest, frozen

pytestmark = [pytest.mark.model, pytest.mark.process]
__all__ = ["frozen"]  # the fixture
# As `accelerate launch` with a configuration of training/recipes sets them.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def test_sharded_states_go_on_after_a_kill_and_in_the_next_round(frozen, tmp_path, drawn_once):
    import shutil

    from transformers import AutoModelForImageTextToText

    shutil.copytree(drawn_once / "cards", tmp_path / "cards")
    given = arguments(frozen, trl={"beta": 0.0, "use_cpu": True}, check_shared_prefix=False)
    given |= {"keep_checkpoints": 9, "micro_batch_size": 4}
    whole, killed, first, second = (
        tmp_path / name for name in ("whole", "killed", "first", "second")
    )
    rounds = {**given, "steps": 2, "rounds": 2}
    parts = [
        {**given, "output": whole, "best": 2},
        {
            **given,
            "output": killed,
            "keep_policy": "best",
            "best": 3,
            "copy": {f"{whole}/checkpoints/checkpoint-2": f"{killed}/checkpoints/checkpoint-2"},
        },
        {**rounds, "output": first},
        {**rounds, "output": second, "refresh_round": 1, "policy": first},
    ]
    (tmp_path / "given.json").write_text(json.dumps(parts, default=str))
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "tests.sharded", str(tmp_path / "given.json")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **FSDP},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    checkpoint = whole / "checkpoints" / "checkpoint-4"
    assert len(list((checkpoint / "optimizer_0").glob("*.distcp"))) == 2, "one of each process"
    assert not (checkpoint / "optimizer.bin").exists()
    assert curve(killed) == curve(whole)
    last = (whole, killed / "last", second)
    weights = [digest(folder / "model.safetensors") for folder in last]
    assert weights[0] == weights[1] == weights[2] != digest(frozen / "policy" / "model.safetensors")
    assert curve(first) + curve(second) == curve(whole)
    weights = [digest(folder / "model.safetensors") for folder in (whole / "best", first, killed)]
    assert weights[0] == weights[1] != weights[2]
    assert AutoModelForImageTextToText.from_pretrained(whole)
    for path in (first / "state").rglob("*.distcp"):
        place = path.relative_to(first / "state")
        assert path.samefile(first / "checkpoints" / "checkpoint-2" / place)
        assert path.samefile(second / "checkpoints" / "checkpoint-2" / place)
