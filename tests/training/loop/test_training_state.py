"""What a round leaves to the next: the same state, no pickle, and nothing large twice on the disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.runtime.errors import StageError
from training.loop import state_files, training_state


def finished_checkpoint(folder: Path, write) -> tuple[Any, dict]:
    """A checkpoint at step 7, whose optimizer and schedule `write` writes; what it holds."""
    import random

    import numpy as np

    checkpoint = folder / "checkpoints" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generators = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    write(checkpoint, "optimizer", optimizer.state_dict())
    write(checkpoint, "scheduler", {"last_epoch": 7, "_last_lr": [0.1]})
    torch.save(generators, checkpoint / "rng_state.pth")
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "global_step7").mkdir()
    (checkpoint / "global_step7" / "shard").write_bytes(b"of deepspeed")
    (checkpoint / "trainer_state.json").write_text(
        '{"global_step": 7, "log_history": [{"step_time": 0.1}]}'
    )
    return checkpoint, {"optimizer": optimizer, "generators": generators}


def as_now(checkpoint: Path, name: str, state: dict) -> None:
    state_files.write(checkpoint / name, state)


def as_before(checkpoint: Path, name: str, state: dict) -> None:
    torch.save(state, checkpoint / f"{name}.pt")


@pytest.mark.parametrize("write", [as_now, as_before])
def test_training_state_goes_over_without_a_pickle_and_comes_back_the_same(tmp_path, write):
    checkpoint, held = finished_checkpoint(tmp_path, write)
    policy = tmp_path / "policy"
    training_state.keep(checkpoint, checkpoint, policy)
    kinds = {path.suffix for path in (policy / "state").iterdir() if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    again = training_state.resume(policy, tmp_path / "next", 7)
    fresh = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.5)
    fresh.load_state_dict(state_files.read(again / "optimizer"))
    for index, state in held["optimizer"].state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, fresh.state_dict()["state"][index][name])
    assert fresh.param_groups[0]["betas"] == (0.8, 0.9)
    assert state_files.read(again / "scheduler") == {"last_epoch": 7, "_last_lr": [0.1]}
    back, generators = training_state._read_rng(again / "rng_state.pth"), held["generators"]
    assert back["python"] == generators["python"]
    assert (back["numpy"][1] == generators["numpy"][1]).all()
    assert torch.equal(back["cpu"], generators["cpu"])
    trainer_state = json.loads((again / "trainer_state.json").read_text())
    assert trainer_state == {"global_step": 7, "log_history": []}


def test_beside_sharded_states_the_libraries_find_their_own_schedule(tmp_path):
    checkpoint, _ = finished_checkpoint(tmp_path, as_before)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "optimizer_0").mkdir()
    (checkpoint / "optimizer_0" / "__0_0.distcp").write_bytes(b"of a process")
    training_state.keep(checkpoint, checkpoint, tmp_path / "policy")
    again = training_state.resume(tmp_path / "policy", tmp_path / "next", 7)
    found = torch.load(again / "scheduler.pt", weights_only=True)
    assert found == {"last_epoch": 7, "_last_lr": [0.1]}
    assert (again / "optimizer_0" / "__0_0.distcp").read_bytes() == b"of a process"


def test_what_is_large_is_written_once_and_handed_over_under_further_names(tmp_path):
    checkpoint, _ = finished_checkpoint(tmp_path, as_now)
    large = {p.stat().st_ino for p in checkpoint.glob("optimizer*")}
    large |= {(checkpoint / "global_step7" / "shard").stat().st_ino}
    policy = tmp_path / "policy"
    training_state.keep(checkpoint, checkpoint, policy, weights=True)
    weights = policy / "state" / "weights"
    assert sorted(p.name for p in weights.iterdir()) == ["config.json", "model.safetensors"]
    assert (weights / "model.safetensors").samefile(checkpoint / "model.safetensors")
    again = training_state.resume(policy, tmp_path / "next", 7)
    for folder in (policy / "state", again):
        assert large <= {p.stat().st_ino for p in folder.rglob("*")}
    before = {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()}
    state_files.write(checkpoint / "optimizer", {"state": torch.zeros(9)})  # of a run cut off there
    shutil.rmtree(checkpoint)
    assert {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()} == before


def test_states_are_written_in_files_of_a_bounded_size_and_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(state_files, "FILE_BYTES", 100)
    shared = torch.arange(20.0)
    state = {
        "of": {n: torch.full((10,), float(n)) for n in range(5)},
        "map": [shared, shared],  # as bitsandbytes has them
        "part": shared[3:5],
        "large": torch.ones(40),
        7: (None, float("inf"), True, "x"),
    }
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        state_files.write(tmp_path / name / "optimizer", state)
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    assert len(files) == 6
    found = state_files.read(tmp_path / "one" / "optimizer")
    assert found[7] == state[7]
    assert all(torch.equal(found["of"][n], state["of"][n]) for n in range(5))
    assert torch.equal(found["part"], shared[3:5])
    assert torch.equal(found["map"][1], shared)
    found["large"].zero_()
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    with pytest.raises(StageError, match="a set cannot be carried"):
        state_files.write(tmp_path / "one" / "other", {"x": {1}})


def test_the_state_that_an_earlier_version_kept_is_read(tmp_path):
    from safetensors.torch import save_file

    told = {"items": [["step", {"tensor": "0"}], ["at", {"tuple": [1, 2]}]]}
    (tmp_path / "optimizer.json").write_text(json.dumps(told))
    save_file({"0": torch.ones(3)}, tmp_path / "optimizer.safetensors")
    found = state_files.read(tmp_path / "optimizer")
    assert torch.equal(found["step"], torch.ones(3))
    assert found["at"] == (1, 2)
    assert len(state_files.files(tmp_path / "optimizer")) == 2
