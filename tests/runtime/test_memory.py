"""Memory: a stage's is that of its process and of all that it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import child, store
from tasks.runtime import command, memory
from tests.conftest import as_config

HOLD = "import sys; held = bytearray(100 << 20); print('held', flush=True); sys.stdin.read()"
# A process that holds nothing itself, but starts one that does.
START = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"
STAGE = f"""
import json, subprocess, sys
from pathlib import Path
config = json.loads(Path(sys.argv[1]).read_text())
holder = subprocess.Popen([sys.executable, "-c", {HOLD!r}], stdin=-1, stdout=-1)
holder.stdout.readline()
Path(config["go"]).read_text()  # blocks until somebody writes
holder.communicate()
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc")


@LINUX
def test_what_processes_below_a_process_hold_is_counted():
    watch = memory.Watch(os.getpid())
    watch.look()
    alone = watch.peak
    assert alone == pytest.approx(memory.own_peak(), rel=0.1)
    other = subprocess.Popen([sys.executable, "-c", START], stdin=-1, stdout=-1)
    try:
        other.stdout.readline()
        started = memory.below(os.getpid())
        assert other.pid in started
        assert len(started) >= 2
        watch.look()
        assert watch.peak > alone + 100
        below_it = memory.Watch(other.pid)
        below_it.look()
        assert 100 < below_it.peak < watch.peak
    finally:
        other.communicate()
    highest = watch.peak
    watch.look()
    assert watch.peak == highest, "it stays when they have ended"
    gone = memory.Watch(other.pid)
    gone.look()
    assert gone.peak == 0.0


FORK = """
import os, sys
held = bytearray(b"x") * (100 << 20)
for _ in range(3):
    if os.fork() == 0:
        break
print("held", flush=True)
sys.stdin.read()
"""


@LINUX
def test_what_processes_share_by_a_fork_counts_once():
    other = subprocess.Popen([sys.executable, "-c", FORK], stdin=-1, stdout=-1)
    try:
        for _ in range(4):
            other.stdout.readline()
        watch = memory.Watch(other.pid)
        assert len(memory.below(other.pid)) == 3
        for _ in range(2):  # also where it is not read again
            watch.look()
            assert 100 < watch.peak < 200
    finally:
        other.communicate()


def test_a_system_that_does_not_tell_what_is_shared_counts_it_in_each(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("VmHWM:\t2048 kB\n")
    untold, told = memory.Watch(7), memory.Watch(7)
    untold.look()
    assert untold.peak == 2.0
    (tmp_path / "7" / "smaps_rollup").write_text(
        "0-1 ---p 0 00:00 0 [rollup]\nPss_Anon: 256 kB\nAnonymous: 512 kB\n"
    )
    told.look()
    assert told.peak == 1.75


def test_where_the_system_does_not_tell_a_process_still_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    with memory.Watch(os.getpid()) as watch:
        pass
    watch.look()
    assert watch.peak == 0.0
    assert memory.own_peak() > 10


@LINUX
def test_the_manifest_counts_what_a_stage_started(tmp_path, monkeypatch):
    (tmp_path / "holding_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "EVERY", 0.01)
    os.mkfifo(tmp_path / "go")
    seen = []

    class Watch(memory.Watch):
        def look(self) -> None:
            super().look()
            if self.peak > 100 and not seen:
                seen.append(self.peak)
                (tmp_path / "go").write_text("on")

    monkeypatch.setattr(child, "Watch", Watch)
    folder = tmp_path / "holding" / "abc"
    store.build(folder, "holding_stage", {"go": str(tmp_path / "go")}, {"stage": "Holding"})
    assert store.read_manifest(folder)["peak_memory_mb"] >= round(seen[0]) >= 100


def test_the_word_a_stage_leaves_counts_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "own_peak", lambda: 50.0)

    class Watch(memory.Watch):
        def look(self) -> None:
            self.peak = 321.0

    def stage(output: Path) -> None:
        """A stage."""
        watches[0].look()

    def watch(root: int) -> Watch:
        watches.append(Watch(root))
        return watches[0]

    watches: list[Watch] = []
    monkeypatch.setattr(command, "Watch", watch)
    for name in ("end_with_parent", "stop_when_asked", "quiet_libraries"):
        monkeypatch.setattr(command, name, lambda: None)
    monkeypatch.setattr(command.gc, "freeze", lambda: None)
    monkeypatch.setattr(command.Bar, "file", None)
    config = as_config(tmp_path / "c.json", {"output": tmp_path / "o"})
    monkeypatch.setattr(sys, "argv", ["stage", str(config)])
    command.main(stage)
    assert watches[0].root == os.getpid()
    assert json.loads((tmp_path / "o" / ".done").read_text()) == {"peak_memory_mb": 321.0}
