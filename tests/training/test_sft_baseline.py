"""The supervised baseline learns the truth and resumes."""

import shutil
from pathlib import Path

import pytest

from tasks.tables import shards
from tests.conftest import run_stage
from tests.training.test_grpo import arguments, digest, frozen  # noqa: F401

pytestmark = pytest.mark.model


def test_supervised_training_learns_the_truth_and_resumes(frozen, tmp_path, monkeypatch):
    from training.loop import checkpoints
    from training.sft_baseline import sft_baseline

    marked = checkpoints.mark_complete

    def mark(folder: Path) -> None:
        marked(folder)
        if folder.name == "checkpoint-3":
            shutil.copytree(tmp_path / "out", tmp_path / "killed")

    monkeypatch.setattr(checkpoints, "mark_complete", mark)

    given = arguments(frozen, method="sft", learning_rate=3e-3, steps=6, questions_per_step=8)
    given |= {"micro_batch_size": 8, "save_steps": 3, "watch_every": 3}
    (tmp_path / "out").mkdir()
    run_stage(sft_baseline, tmp_path / "out", **given)
    log = shards.read(tmp_path / "out", "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[2]["val_accuracy"] is not None
    run_stage(sft_baseline, tmp_path / "killed", **given)
    again = shards.read(tmp_path / "killed", "train_log").to_pylist()
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    weights = [digest(tmp_path / name / "model.safetensors") for name in ("out", "killed")]
    assert weights[0] == weights[1]
