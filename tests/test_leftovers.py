"""python -m pipeline gc: which working folders stay, which go, and that none goes that is in use."""

import json
import os
import time
from pathlib import Path

import pytest

from pipeline import artifact, leftovers, lock, status, tasks
from pipeline.settings import SettingsError
from tests.test_stage import config  # noqa: F401 - a fixture
from tests.test_workbench import commit, run

OLD = 8 * 86400  # seconds


@pytest.fixture
def root(config, tmp_path) -> Path:  # noqa: F811
    """An empty folder of artifacts, to which the default settings point."""
    root = tmp_path / "artifacts"
    root.mkdir()
    config.set("run", "artifacts", str(root))
    return root


def cut_off(folder: Path, age: float = 0, **recipe) -> Path:
    """The working folder of the artifact `folder`, with a shard of 100 bytes."""
    partial = artifact.partial_of(folder)
    partial.mkdir(parents=True)
    (partial / "rollouts-00000.parquet").write_bytes(b"x" * 100)
    (partial / artifact.RECIPE).write_text(json.dumps(recipe))
    then = time.time() - age
    for path in (*partial.iterdir(), partial):
        os.utime(path, (then, then))
    return partial


def only(root: Path, **given) -> leftovers.Leftover:
    (found,) = leftovers.leftovers(root, **given)
    return found


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        (lambda: tasks.Propose(method="dive_k", refresh_round=1), {}),
        (lambda: tasks.Train(method="virft", refresh_round=0, seed=2), {"seed": 2}),
        (lambda: tasks.Propose(method="dive_k", refresh_round=0, seed=7), {"seed": 7000}),
        (lambda: tasks.Evaluate(method="dive_k", refresh_round=0), {}),  # a row of Compare
        (lambda: tasks.Compare(), {}),
        (lambda: tasks.Split(dataset="pets"), {}),
        (lambda: tasks.Train(dataset="flowers+pets", method="dive_k", refresh_round=0), {}),
    ],
    ids=["default", "method and seed", "seed of Propose", "round", "Compare", "set", "mix"],
)
def test_what_a_run_would_go_on_from_stays_however_old(root, stage, recipe):
    wanted = stage()
    cut_off(wanted.folder, OLD, **recipe)
    found = only(root)
    assert found.kept
    assert found.why.startswith(f"a run of {wanted.task_family} ")
    assert found.bytes > 100
    assert found.days == pytest.approx(8, abs=0.1)


def test_a_published_models_working_folder_stays_though_it_is_no_sets(root, config):  # noqa: F811
    config.set("BasePolicy", "model", "some/folder")
    config.set("BasePolicy", "steps", "0")
    cut_off(tasks.BasePolicy().folder, OLD)
    assert only(root).why.startswith("a run of BasePolicy ")


def test_what_no_stage_wants_goes_when_it_is_old_enough(root):
    stage = tasks.Propose(method="dive_k", refresh_round=1)
    cut_off(stage.folder.with_name("0123456789abcdef"), OLD)
    assert not only(root).kept
    young = only(root, older_than=9)
    assert young.kept
    assert "it stays until it is 9 days old" in young.why
    cut_off(root / "no_such_card/download/0123456789abcdef", OLD)
    assert [each.kept for each in leftovers.leftovers(root)] == [False, False]


def test_a_changed_setting_makes_a_working_folder_garbage_and_changed_back_keeps_it(root, config):  # noqa: F811
    stage = tasks.Propose(method="dive_k", refresh_round=1)
    cut_off(stage.folder, OLD)
    for rollouts, kept in (("21", False), ("20", True)):
        config.set("Propose", "num_rollouts", rollouts)
        type(stage).clear_instance_cache()
        assert only(root).kept == kept


def test_one_that_is_worked_on_stays_and_is_never_deleted(root):
    folder = root / "beetles/round0/propose/0123456789abcdef"
    partial = cut_off(folder, OLD)
    doomed = only(root)
    assert not doomed.kept
    with lock.held(artifact.lock_of(folder), 0):
        found = only(root)
        assert found.kept
        assert found.why == f"process {os.getpid()} is at work on it"
        assert not leftovers.remove(doomed), "taken up between looking and deleting"
        assert partial.exists()
    foreign = {"machine": "b/1", "host": "b", "pid": 7, "nonce": "n"}
    artifact.lock_of(folder).write_text(json.dumps(foreign))
    assert only(root).why == "process 7 on b is at work on it"
    artifact.lock_of(folder).write_text(json.dumps(foreign | {"machine": lock.this_machine()}))
    assert leftovers.remove(only(root)), "its owner is dead"
    assert list(folder.parent.iterdir()) == []


def test_without_settings_everything_stays(root, monkeypatch):
    def unreadable():
        raise SettingsError("luigi.cfg: unknown section [Tain]")

    cut_off(root / "beetles/round0/propose/0123456789abcdef", OLD)
    monkeypatch.setattr("pipeline.settings.check_configuration", unreadable)
    found = only(root, older_than=0)
    assert found.kept
    assert found.why.endswith("cannot be told: luigi.cfg: unknown section [Tain]")


def test_a_deletion_that_was_cut_off_leaves_no_artifact_and_is_finished(root, monkeypatch):
    made = root / "made"
    made.mkdir()
    (made / "a.txt").write_text("a")
    folder = commit(root, "beetles/download", "d1", "Download", made)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda _: None)
        artifact.remove(folder)
    assert not folder.exists()
    assert list(status.artifacts(root)) == []
    found = only(root)
    assert (found.kept, found.why) == (False, "its deletion was cut off")
    assert leftovers.remove(found)
    assert leftovers.leftovers(root) == []


def test_gc_tells_them_apart_and_deletes_only_when_asked(root, config, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(root.parent)
    Path("luigi.cfg").write_text(f"[run]\nartifacts = {root}\ndataset = beetles\n")
    wanted = cut_off(tasks.Split(dataset="beetles").folder)
    other = cut_off(root / "beetles/split/0123456789abcdef", OLD)
    assert run(monkeypatch, "gc") == 0
    told = capsys.readouterr().out
    assert "0 artifacts, 0.0 MB, would be deleted" in told
    assert "working folders of runs that were cut off:" in told
    assert "1 of 2 working folders, 0.0 MB, would be deleted by --delete" in told
    assert " a run of Split beetles seed 0 goes on from it" in told
    assert run(monkeypatch, "gc", "--json", "--partial-older-than", "9") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["artifacts"] == []
    assert [each["kept"] for each in found["partial"]] == [True, True]
    assert other.exists()
    assert run(monkeypatch, "gc", "--delete") == 0
    assert "1 of 2 working folders, 0.0 MB, deleted" in capsys.readouterr().out
    assert (wanted.exists(), other.exists()) == (True, False)
