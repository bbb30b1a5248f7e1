"""python -m pipeline gc: which working folders stay, which go, and that none goes that is in use."""

import json
import os
import time
from pathlib import Path

import pytest

from pipeline.artifacts import lock, store
from pipeline.cli import clean, status
from tests.pipeline.cli.test_commands import commit, run

OLD = 8 * 86400  # seconds


@pytest.fixture
def root(tmp_path) -> Path:
    """An empty folder of artifacts."""
    root = tmp_path / "artifacts"
    root.mkdir()
    return root


def cut_off(folder: Path, age: float = 0) -> Path:
    """The working folder of the artifact `folder`, with a shard of 100 bytes."""
    partial = store.partial_of(folder)
    partial.mkdir(parents=True)
    (partial / "rollouts-00000.parquet").write_bytes(b"x" * 100)
    (partial / store.RECIPE).write_text("{}")
    then = time.time() - age
    for path in (*partial.iterdir(), partial):
        os.utime(path, (then, then))
    return partial


def only(root: Path, **given) -> clean.Leftover:
    (found,) = clean.leftovers(root, **given)
    return found


def test_one_stays_until_it_is_old_enough(root):
    """Whatever the settings are now: those it was begun with may come again."""
    cut_off(root / "beetles/dive_k/round1/propose/0123456789abcdef", OLD)
    found = only(root)
    assert (found.kept, found.why) == (False, "nothing was written to it for 7 days")
    assert found.bytes > 100
    assert found.days == pytest.approx(8, abs=0.1)
    young = only(root, older_than=9)
    assert young.kept
    assert "it stays until it is 9 days old" in young.why


def test_its_age_is_that_of_its_newest_file(root):
    partial = cut_off(root / "beetles/split/0123456789abcdef", OLD)
    (partial / "logs").mkdir()
    (partial / "logs/run.log").write_text("at work today")
    for folder in (partial / "logs", partial):
        os.utime(folder, (time.time() - OLD, time.time() - OLD))
    assert only(root).kept


def test_one_that_is_worked_on_stays_and_is_never_deleted(root):
    folder = root / "beetles/round0/propose/0123456789abcdef"
    partial = cut_off(folder, OLD)
    doomed = only(root)
    assert not doomed.kept
    with lock.held(store.lock_of(folder), 0):
        found = only(root)
        assert found.kept
        assert found.why == f"process {os.getpid()} is at work on it"
        assert not clean.remove(doomed), "taken up between looking and deleting"
        assert partial.exists()
    foreign = {"machine": "b/1", "host": "b", "pid": 7, "nonce": "n"}
    store.lock_of(folder).write_text(json.dumps(foreign))
    assert only(root).why == "process 7 on b is at work on it"
    store.lock_of(folder).write_text(json.dumps(foreign | {"machine": lock.this_machine()}))
    assert clean.remove(only(root)), "its owner is dead"
    assert list(folder.parent.iterdir()) == []


def test_one_whose_artifact_is_there_goes_at_once(root):
    folder = root / "beetles/split/0123456789abcdef"
    cut_off(folder)
    folder.mkdir()
    assert (only(root).kept, only(root).why) == (False, "its artifact is there")


def test_a_deletion_that_was_cut_off_leaves_no_artifact_and_is_finished(root, monkeypatch):
    made = root / "made"
    made.mkdir()
    (made / "a.txt").write_text("a")
    folder = commit(root, "beetles/download", "d1", "Download", made)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda _: None)
        store.remove(folder)
    assert not folder.exists()
    assert list(status.artifacts(root)) == []
    found = only(root)
    assert (found.kept, found.why) == (False, "its deletion was cut off")
    assert clean.remove(found)
    assert clean.leftovers(root) == []


def test_gc_tells_them_apart_and_deletes_only_when_asked(root, monkeypatch, capsys):
    monkeypatch.chdir(root.parent)
    Path("luigi.cfg").write_text(f"[run]\nartifacts = {root}\ndataset = beetles\n")
    young = cut_off(root / "beetles/split/fedcba9876543210")
    old = cut_off(root / "beetles/split/0123456789abcdef", OLD)
    assert run(monkeypatch, "gc") == 0
    told = capsys.readouterr().out
    assert "0 artifacts, 0.0 MB, would be deleted" in told
    assert "working folders of runs that were cut off:" in told
    assert "1 of 2 working folders, 0.0 MB, would be deleted by --delete" in told
    assert " a run with its settings goes on from it" in told
    assert run(monkeypatch, "gc", "--json", "--partial-older-than", "9") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["artifacts"] == []
    assert [each["kept"] for each in found["partial"]] == [True, True]
    assert old.exists()
    assert run(monkeypatch, "gc", "--delete") == 0
    assert "1 of 2 working folders, 0.0 MB, deleted" in capsys.readouterr().out
    assert (young.exists(), old.exists()) == (True, False)
