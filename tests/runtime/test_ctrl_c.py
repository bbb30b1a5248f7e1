"""Ctrl-C at real stages in real processes: once finishes what is at hand, twice ends it at once.

The shards of Download, Propose, BuildMCQ and Evaluate stop alike (test_child.py, test_line.py); here
are the stages that have none, or whose shards are steps or verdicts. A stage is held in the middle
of its work until it was told to stop, so nothing depends on how fast it is.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.artifacts import store
from tasks.ingest.settings import SplitSettings
from tests.conftest import ROOT, settings_of
from tests.test_compare import runs  # noqa: F401 - a fixture
from tests.test_judge import evaluated, server  # noqa: F401 - fixtures
from tests.test_report import build_tree

pytestmark = pytest.mark.process
# Runs a stage as `python -m STAGE` does, but holds it where it first calls `NAME` of `HOME`.
HELD = """
import importlib, os, runpy, time
from pathlib import Path
stage, home, name = os.environ["HELD"].split()
owner = importlib.import_module(home)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
real = getattr(owner, last)
def held(*args, **kwargs):
    Path("begun").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return real(*args, **kwargs)
setattr(owner, last, held)
runpy.run_module(stage, run_name="__main__")
"""
BUILD = """
import json, sys
from pathlib import Path
from pipeline.artifacts import store
module, arguments = json.loads(sys.argv[1])
store.build(Path("made/abc"), module, arguments, {"stage": "Some", "fingerprint": "abc"})
"""
SHARES = {"test_share": 0.2, "val_share": 0.1, "pretrain_share": 0.2}
POLICY = {
    "model": "tiny", "card": "few", "seed": 0, "prompt_style": "brief", "steps": 3,
    "batch_size": 2, "learning_rate": 0.003, "muon_learning_rate": 0.02, "question_share": 0.5,
    "blind_share": 0.5, "min_pixels": 7056, "max_pixels": 7056, "dtype": "float32",
}  # fmt: skip
JUDGE = {
    "card": "few", "model": "m", "api_key_env": "", "max_tokens": 8, "concurrency": 1,
    "timeout": 30.0, "attempts": 1, "shard_size": 1, "max_failed_share": 0.0,
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder to run in; cards are looked for in its folder `cards`."""
    (tmp_path / "held_stage.py").write_text(HELD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def interrupt(presses: int, held: str, arguments: dict, unit: str) -> str:
    """Start a stage, press Ctrl-C in the middle of it, let it go on; what was printed."""
    started = subprocess.Popen(
        [sys.executable, "-c", BUILD, json.dumps(["held_stage", arguments], default=str)],
        env={**os.environ, "HELD": held}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def wait(reached: Callable[[], bool]) -> None:
        while not reached():
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.01)

    log = Path("made/abc.partial/run.log")
    wait(Path("begun").exists)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to everybody in the group
    wait(lambda: f"stopping after this {unit}" in log.read_text())
    if presses == 1:
        Path("go").touch()
    else:
        os.killpg(started.pid, signal.SIGINT)
    _, told = started.communicate(timeout=120)
    assert started.returncode == -signal.SIGINT
    assert "press Ctrl-C again to stop at once" in told
    assert "Traceback" not in told
    assert not Path("made/abc.lock").exists()
    return told


def finish(module: str, arguments: dict) -> Path:
    """The same stage once more, without interruption."""
    told = {"stage": "Some", "fingerprint": "abc"}
    store.build(Path("made/abc"), module, json.loads(json.dumps(arguments, default=str)), told)
    return Path("made/abc")


@pytest.mark.parametrize("stage", ["split", "report", "compare"])
def test_a_short_stage_is_finished_and_committed(place, request, stage):
    arguments, calls = {
        "split": lambda: (split_arguments(request), "data_cards load"),
        "report": lambda: (report_arguments(place), "data_cards load"),
        "compare": lambda: (
            {"runs": request.getfixturevalue("runs")},
            "tasks.evaluation.metrics holm",
        ),
    }[stage]()
    interrupt(1, f"tasks.{stage} {calls}", arguments, "stage")
    assert store.read_manifest(Path("made/abc"))["stage"] == "Some"
    assert not Path("made/abc.partial").exists()


def test_a_short_stage_ends_at_once_when_pressed_twice_and_is_done_again(place, request):
    arguments = split_arguments(request)
    interrupt(2, "tasks.split data_cards load", arguments, "stage")
    assert not Path("made/abc").exists()
    assert not list(Path("made/abc.partial").glob("*.parquet"))
    assert (finish("tasks.split", arguments) / "split.parquet").exists()


def test_the_base_policy_stops_after_its_step_with_a_checkpoint(place, split_set):
    """That the next run goes on from it, to the very same weights, is shown in test_sft.py."""
    arguments = POLICY | {"download": [split_set.download], "split": [split_set.split]}
    told = interrupt(1, "training.sft tasks.runtime.progress Bar.update", arguments, "step")
    assert "base_policy: stopped; the same command goes on from here" in told
    assert not Path("made/abc").exists()
    assert Path("made/abc.partial/checkpoints/supervised.pt").exists()


def test_the_judge_keeps_the_verdicts_it_has(place, request):
    served: SimpleNamespace = request.getfixturevalue("server")
    arguments = JUDGE | {"evaluate": request.getfixturevalue("evaluated"), "url": served.url}
    arguments["artifacts"] = place / "artifacts"
    interrupt(1, "tasks.judge tasks.tables.shards write", arguments, "shard")
    assert not Path("made/abc").exists()
    assert [path.name for path in Path("made/abc.partial").glob("*.parquet")] == ["verdicts-00000.parquet"]  # fmt: skip
    asked = len(served.asked)
    made = finish("tasks.judge", arguments)
    assert asked == 1
    assert len(served.asked) == json.loads((made / "stats.json").read_text())["pairs"] == 3


def test_ctrl_c_while_a_stage_is_being_loaded_ends_it_quietly(place):
    (place / "loading_stage.py").write_text(
        "import time\nfrom pathlib import Path\nPath('begun').touch()\nwhile True: time.sleep(0.01)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", BUILD, json.dumps(["loading_stage", {}])],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not Path("begun").exists():
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == -signal.SIGINT
    assert "Traceback" not in told
    assert not Path("made/abc").exists()


def split_arguments(request) -> dict:
    made = request.getfixturevalue("split_set")
    fixed = {"card": "few", "seed": 0, **settings_of(SplitSettings, **SHARES).values()}
    return fixed | {"download": made.download}


def report_arguments(place: Path) -> dict:
    (place / "toy").mkdir()
    tree = build_tree(place / "toy")
    (place / "cards").mkdir(exist_ok=True)
    shutil.copy(place / "toy/toy.md", place / "cards")
    return tree
