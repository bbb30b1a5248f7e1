"""A stage's process: its log, its last words, its progress, Ctrl-C, and tokens that stay secret."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.artifacts import child, store
from tasks.runtime.protocol import PROGRESS_FILE
from tests.conftest import ROOT

TOKEN = "hf_canaryCanaryCanary0123456789"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Build an artifact whose stage is the given source; returns its folder."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def build(source: str, **told) -> Path:
        (tmp_path / "some_stage.py").write_text(source)
        folder = tmp_path / "x" / "abc"
        store.build(folder, "some_stage", {}, {"stage": "Some", "fingerprint": "abc"}, **told)
        return folder

    build.folder = tmp_path / "x"
    return build


def test_what_a_stage_says_is_in_its_log_as_a_terminal_shows_it(stage, capfd):
    folder = stage(
        "import sys\nprint('begun')\n"
        "for i in range(3): sys.stderr.write(f'\\rbar {i}')\n"
        "sys.stderr.write('\\n'); print('ended')"
    )
    log = (folder / "run.log").read_text()
    assert log.splitlines()[0].startswith("--- ")
    assert "some_stage" in log.splitlines()[0]
    assert {"begun", "bar 2", "ended"} <= set(log.splitlines())
    assert "bar 1" not in log
    told = capfd.readouterr()
    assert told.out == "begun\nended\n"
    assert told.err == "\rbar 0\rbar 1\rbar 2\n"


def test_a_bug_is_reported_with_the_last_lines_and_the_log(stage):
    says = r"(?s)^Some failed: ValueError: oops \(exit code 1; the log is \S*run\.log, and .*before"
    with pytest.raises(store.StageFailed, match=says):
        stage("print('before')\nraise ValueError('oops')")
    assert "oops" in (stage.folder / "abc.partial" / "run.log").read_text()


def test_the_log_of_every_attempt_is_kept(stage):
    for source in ("raise SystemExit('first')", "print('second')"):
        try:
            folder = stage(source)
        except store.StageFailed:
            continue
    log = (folder / "run.log").read_text()
    assert log.count("--- ") == 2
    assert "first" in log
    assert "second" in log


def test_tokens_of_the_environment_are_in_no_log_manifest_or_recipe(stage, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", f"sk-{TOKEN}")
    folder = stage(
        "import os, sys, time\nfor name in ('HF_TOKEN', 'OPENAI_API_KEY'):\n"
        "    for part in (os.environ[name][:9], os.environ[name][9:]):\n"
        "        sys.stdout.write(part); sys.stdout.flush(); time.sleep(0.05)\n"
        "    print(' and', os.environ[name])"
    )
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"canary" not in everything.lower()
    told = capfd.readouterr()
    assert "canary" not in (told.out + told.err).lower()
    assert told.out.count("***") == 4


def test_a_failing_stage_does_not_tell_a_token_either(stage, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(store.StageFailed) as caught:
        stage("import os\nraise ValueError(os.environ['HF_TOKEN'])")
    assert TOKEN not in str(caught.value)
    assert "***" in str(caught.value)


def test_progress_is_told_on_the_way(stage, monkeypatch):
    monkeypatch.setattr(child, "POLL", 0.01)
    seen = []
    stage(
        "import json, sys, time\nfrom pathlib import Path\n"
        "config = json.loads(Path(sys.argv[1]).read_text())\n"
        "told = {'what': 'propose', 'done': 300, 'total': 1200, 'unit': 'images'}\n"
        "Path(config['output'], '.progress.json').write_text(json.dumps(told))\n"
        "while not Path(config['output'], 'heard').exists(): time.sleep(0.01)",
        on_progress=lambda *told: (seen.append(told), (stage.folder / "abc.partial/heard").touch()),
    )  # fmt: skip
    assert seen[0] == ("propose: 300 of 1,200 images", 25)


def test_the_bar_leaves_its_figures_in_a_file(tmp_path, monkeypatch):
    from tasks.runtime import progress as module

    monkeypatch.setattr(module.Bar, "file", tmp_path / PROGRESS_FILE)
    monkeypatch.setattr(module.Bar, "written_at", -1e9)
    with module.progress(None, desc="propose", total=10, unit="images", done=2) as bar:
        bar.update(3)
    told = json.loads((tmp_path / PROGRESS_FILE).read_text())
    assert told == {"what": "propose", "done": 5, "total": 10, "unit": "images"}
    assert child.progress(tmp_path) == told


@pytest.mark.parametrize("terminal", [True, False])
def test_a_word_beside_the_bar_says_what_goes_on(tmp_path, monkeypatch, capfd, terminal):
    from tasks.runtime import progress as module

    monkeypatch.setattr(module.Bar, "file", tmp_path / PROGRESS_FILE)
    monkeypatch.setenv("DIVE_TERMINAL", "1" if terminal else "")
    module.doing("generating")  # without a bar nothing is said
    with module.progress(None, desc="train", total=10, unit="steps") as bar:
        bar.set_postfix_str("reward 0.5", refresh=False)
        before = capfd.readouterr().err
        for word in ("generating", "updating"):
            module.doing(word)
            assert child.progress(tmp_path)["now"] == word
        shown = capfd.readouterr().err
    assert "generating" not in before
    assert [f"{word}, reward 0.5" in shown for word in ("generating", "updating")] == [terminal] * 2
    assert shown == "" or terminal  # a log file has no line more
    module.doing("generating")
    assert child.progress(tmp_path)["now"] == "updating"  # its bar is closed


SHARDS = """
import time
from pathlib import Path
from tasks.runtime.command import main
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
def slow(output: Path) -> None:
    "Shard after shard."
    with shard_by_shard():
        for number in range(100):
            (output / f"begun-{number}").touch()
            while not (output / "go").exists():
                time.sleep(0.01)
            time.sleep(0.3)
            (output / f"shard-{number}").touch()
            stop_if_asked()
if __name__ == "__main__":
    main(slow)
"""
BUILD = (
    "import sys; from pathlib import Path; from pipeline.artifacts import store\n"
    "store.build(Path(sys.argv[1]), 'slow_stage', {}, {'stage': 'Slow'})"
)


@pytest.mark.process
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_once_finishes_the_shard_and_twice_stops_at_once(tmp_path, presses):
    (tmp_path / "slow_stage.py").write_text(SHARDS)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    run = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tmp_path / "x" / "abc")],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    partial = tmp_path / "x" / "abc.partial"
    wait_for(partial / "begun-0", run)
    for press in range(presses):
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to everybody in the group
        if press + 1 < presses:
            wait_for_text(partial / "run.log", "stopping after this shard", run)
    if presses == 1:
        wait_for_text(partial / "run.log", "stopping after this shard", run)
        (partial / "go").touch()
    _, told = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT
    assert "press Ctrl-C again to stop at once" in told
    assert "Traceback" not in told
    finished = sorted(path.name for path in partial.glob("shard-*"))
    assert finished == (["shard-0"] if presses == 1 else [])
    assert not (tmp_path / "x" / "abc").exists()
    assert not (tmp_path / "x" / "abc.lock").exists()
    if presses == 1:
        assert "slow: stopped; the same command goes on from here" in told


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def wait_for_text(path: Path, text: str, process: subprocess.Popen) -> None:
    while text not in path.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/x/y"), "/x/y: No space left on device; make room"),
        (OSError(13, "Permission denied", "/x/y"), "make it accessible and run again"),
        (MemoryError(), "there is not enough memory"),
        (FileNotFoundError(2, "No such file", "/x"), None),
    ],
)  # fmt: skip
def test_what_a_person_can_mend_is_one_sentence_and_a_bug_is_not(error, told):
    from tasks.runtime import errors

    sentence = errors.sentence(error)
    assert sentence is None if told is None else told in sentence


def test_a_stage_that_was_finished_when_the_run_was_cut_off_is_not_done_again(stage):
    partial = stage.folder / "abc.partial"
    partial.mkdir(parents=True)
    (partial / "weights").write_text("hours of work")
    (partial / ".done").write_text('{"peak_memory_mb": 321.4}')
    folder = stage("raise SystemExit('done again')")
    manifest = store.read_manifest(folder)
    assert (folder / "weights").read_text() == "hours of work"
    assert manifest["peak_memory_mb"] == 321
    assert not list(folder.glob(".*"))


def test_a_commit_that_was_cut_off_is_gone_on_with(stage):
    partial = stage.folder / "abc.partial"
    partial.mkdir(parents=True)
    for name, text in (("manifest.json", "{}"), ("recipe.json", "{}"), ("out.txt", "old")):
        (partial / name).write_text(text)
        (partial / name).chmod(0o444)
    partial.chmod(0o555)
    folder = stage("print('again')")
    assert store.read_manifest(folder)["stage"] == "Some"
    assert folder.stat().st_mode & 0o222 == 0


@pytest.mark.parametrize(
    "where", ["os.rename", "os.fsync", "pathlib.Path.chmod", "pathlib.Path.write_bytes"]
)
def test_wherever_a_commit_is_cut_off_the_work_is_not_done_again(stage, monkeypatch, where):
    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    partial = stage.folder / "abc.partial"
    (partial / "checkpoints").mkdir(parents=True)
    (partial / "weights").write_text("hours of work")
    (partial / ".done").write_text('{"peak_memory_mb": 321.4}')
    with monkeypatch.context() as patch:
        patch.setattr(where, killed)
        with pytest.raises(Killed):
            stage("raise SystemExit('done again')")
    folder = stage("raise SystemExit('done again')")
    assert store.read_manifest(folder)["peak_memory_mb"] == 321
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "recipe.json", "weights"]


def test_a_launcher_is_looked_for_beside_this_python_and_named_where_there_is_none():
    started = store.starter("accelerate launch --num_processes 2")
    assert started[1:] == ["launch", "--num_processes", "2"]
    assert Path(started[0]).parent == Path(sys.executable).parent
    assert store.starter("") == [sys.executable]
    with pytest.raises(store.StageFailed, match="no command 'acelerate'"):
        store.starter("acelerate launch")
