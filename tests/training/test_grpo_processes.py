"""Several processes compute what one does, and go on after a kill."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest

from tasks.tables import shards
from tasks.tables.schemas import JOINT
from tests.conftest import ROOT, as_config
from tests.training.test_grpo import (  # noqa: F401
    TWO_PROCESSES,
    arguments,
    curve,
    digest,
    frozen,
    trained,
)

pytestmark = pytest.mark.model


def test_two_processes_compute_what_one_does(frozen, tmp_path, drawn_once, monkeypatch):
    """Also in pairs, of three questions a step, so that the middle one's group is on both processes."""
    from safetensors.torch import load_file

    from tests import two_processes
    from training.loop import sampling

    def given(kind: str, name: str) -> dict:
        # Adam would blow rounding up to steps of its own where a gradient is nearly zero.
        options = {"beta": 0.05, "use_cpu": True, "max_grad_norm": 0.0, "optim": "sgd"}
        changed: dict = {"watch_every": 2}
        if kind == "pairs":
            options["scale_rewards"] = "batch"
            changed = {"pairs": True, "rewards": {"contrast": 1.0}}
            changed |= {"questions_per_step": 3, "micro_batch_size": 2}
        output = tmp_path / f"{kind}-{name}"
        return arguments(frozen, output=output, steps=2, trl=options, **changed)

    kinds = ("plain", "pairs")
    for kind in kinds:
        monkeypatch.setattr(sampling, "Timed", two_processes.fixed(kind == "pairs"))
        one = given(kind, "one")
        trained(one.pop("output"), one)
    configs = [as_config(tmp_path / f"{kind}.json", given(kind, "two")) for kind in kinds]
    shutil.copytree(drawn_once / "cards", tmp_path / "cards")
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "tests.two_processes", *map(str, configs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in kinds:
        folders = [tmp_path / f"{kind}-{name}" for name in ("one", "two")]
        logs = [shards.read(folder, "train_log").to_pylist() for folder in folders]
        weights = [load_file(folder / "model.safetensors") for folder in folders]
        assert kind == "pairs" or logs[0][0]["loss"] != 0
        for row, other in zip(*logs, strict=True):
            # Not the logged KL: TRL averages it over micro-batches, however many tokens each has.
            for key in ("loss", "reward", "dead_group_share", "completion_length"):
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
            assert row["val_accuracy"] == other["val_accuracy"]
        for name, tensor in weights[0].items():
            assert (tensor - weights[1][name]).abs().max() < 1e-4, name
    columns = ("step", "mcq_id", "completion", "reward/contrast", "advantage")
    both = [
        [tuple(row[name] for name in columns) for row in shards.read(f, "completions").to_pylist()]
        for f in folders
    ]
    assert both[0] == [(*row[:4], pytest.approx(row[4], abs=1e-6)) for row in both[1]]
    assert len({row[3] for row in both[0]}) > 1, "some are paid, and some are not"
    assert any(JOINT in row[1] for row in both[0]), "the middle question is one of its pair"


def test_two_processes_that_were_killed_end_as_if_nothing_had_been(frozen, tmp_path, drawn_once):
    """Each process's random numbers, and with them its completions, go on where they were.

    The launcher gives its processes a group of their own: they end when they find it gone.
    """
    shutil.copytree(drawn_once / "cards", tmp_path / "cards")

    def start(name: str) -> subprocess.Popen:
        config = as_config(
            tmp_path / f"{name}.json", arguments(frozen, output=tmp_path / name, steps=6)
        )
        return subprocess.Popen(
            [*TWO_PROCESSES, "-m", "training.grpo", str(config)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DIVE_PARENT": str(os.getpid())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    killed = start("killed")
    complete = tmp_path / "killed" / "checkpoints" / "checkpoint-1" / "complete"
    while not complete.exists() and killed.poll() is None:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    _, told = killed.communicate()  # to the end of all that write there
    assert complete.exists(), told[-3000:]
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "killed too late to tell"
    for name in ("killed", "unbroken"):
        run = start(name)
        _, told = run.communicate()
        assert run.returncode == 0, told[-3000:]
    folders = [tmp_path / name for name in ("killed", "unbroken")]
    assert curve(folders[0]) == curve(folders[1])
    weights = [digest(folder / "model.safetensors") for folder in folders]
    assert weights[0] == weights[1] != digest(frozen / "policy" / "model.safetensors")
