"""The artifact's life without Luigi: committed, frozen, described; failures named."""

import json
import subprocess
import sys

import pytest

from pipeline.artifacts import store
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401

ECHO = """
import json, sys
from pathlib import Path
config = json.loads(Path(sys.argv[1]).read_text())
(Path(config["output"]) / "out.txt").write_text("done")
(Path(config["output"]) / "stats.json").write_text('{"tokens": 7}')
"""


def test_a_committed_artifact_is_frozen_and_described(tmp_path, monkeypatch):
    (tmp_path / "echo_stage.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "round0" / "echo" / "abc"
    store.build(folder, "echo_stage", {}, {"stage": "Echo", "fingerprint": "abc"})
    manifest = store.read_manifest(folder)
    assert manifest["files"]["out.txt"]["bytes"] == 4
    assert manifest["peak_memory_mb"] > 1
    assert manifest["stats"] == {"tokens": 7}
    assert (folder / "out.txt").stat().st_mode & 0o222 == 0
    assert folder.stat().st_mode & 0o222 == 0
    assert (folder.parent / "current").resolve() == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["abc", "current"]
    recorded = json.loads((folder / "recipe.json").read_text())
    assert recorded["output"] == str(folder)


def test_a_child_killed_by_a_signal_is_named_with_its_memory(tmp_path, monkeypatch):
    (tmp_path / "dying_stage.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(store.StageFailed, match=r"Dying was killed by SIGKILL after \d+ MB"):
        store.build(tmp_path / "x" / "abc", "dying_stage", {}, {"stage": "Dying"})
    assert not (tmp_path / "x" / "abc").exists()


@pytest.mark.process
def test_two_builders_of_one_artifact_one_works_the_other_is_told_who(tmp_path, monkeypatch):
    (tmp_path / "slow_stage.py").write_text("import time; time.sleep(1.5)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(store, "LOCK_PATIENCE", 0.3)
    code = (
        "from pathlib import Path; from pipeline.artifacts import store;"
        f"store.build(Path({str(tmp_path / 'x' / 'abc')!r}), 'slow_stage', {{}}, {{'stage': 'Slow'}})"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    lock = tmp_path / "x" / "abc.lock"
    for _ in range(200):
        if lock.exists() and lock.read_text():
            break
        time_sleep(0.05)
    with pytest.raises(store.StageFailed, match=rf"process {first.pid} is already building"):
        store.build(tmp_path / "x" / "abc", "slow_stage", {}, {"stage": "Slow"})
    assert first.wait() == 0
    assert (tmp_path / "x" / "abc" / "manifest.json").exists()


def time_sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)
