"""A small world to break: a drawn set, an engine without a model, and stages that run in forks.

Stages run as they do in earnest, as Luigi tasks whose work is a child process with a lock, a log
and a working folder; only that the processes are forked from this one, which has imported
everything, and not started anew. So a stage takes a fraction of a second and can be killed often.
"""

import importlib
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, write_few_card

COUNTS = "{pretrain: 2, train: 3, val: 1, test: 2}"
SETTINGS = {
    ("engine", "backend"): "tests.fakes:engine",
    ("BasePolicy", "steps"): "12",
    ("Propose", "shard_size"): "6",
    ("Propose", "num_rollouts"): "8",
    ("BuildMCQ", "shard_size"): "6",
    ("Evaluate", "shard_size"): "8",
    ("Evaluate", "num_rollouts"): "8",
    ("Train", "steps"): "8",
    ("Train", "questions_per_step"): "4",
    ("Train", "num_generations"): "4",
    ("Train", "micro_batch_size"): "16",
    ("Train", "save_steps"): "2",
    ("Split", "pretrain_share"): "0.2",
}
IMAGES_PER_SHARD = 40
FUNCTIONS = {"training.sft": "base_policy"}
# What differs between two runs of the same work: times, paths, words.
NOT_COMPARED = ("manifest.json", "run.log", "recipe.json", "stats.json", "train_log.parquet")


def enter(root: Path, **changed: str) -> None:
    """Make `root` a place to run in, go there, and read its settings."""
    from luigi import configuration
    from luigi.task_register import Register

    root.mkdir(parents=True, exist_ok=True)
    write_few_card(root / "cards", COUNTS)
    text = (ROOT / "luigi.cfg").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^dataset = .*$", "dataset = few", text)
    (root / "luigi.cfg").write_text(text, encoding="utf-8")
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    parser = configuration.LuigiConfigParser()
    parser.read("luigi.cfg")
    for (section, key), value in SETTINGS.items():
        if parser.has_option(section, key):
            parser.set(section, key, value)
    for key, value in changed.items():
        parser.set("run", key, value)
    with open("luigi.cfg", "w", encoding="utf-8") as file:
        parser.write(file)
    configuration.LuigiConfigParser._instance = parser
    Register.clear_instance_cache()


def stages() -> dict[str, Any]:
    """The stages that are broken here, by name, inputs first; the last two train a model."""
    from pipeline import tasks

    zero = {"dataset": "few", "method": "zero_shot"}
    return {
        "Download": tasks.Download(dataset="few"),
        "Split": tasks.Split(dataset="few"),
        "Propose": tasks.Propose(dataset="few"),
        "BuildMCQ": tasks.BuildMCQ(dataset="few"),
        "Evaluate": tasks.Evaluate(**zero, refresh_round=0),
        "Report": tasks.Report(**zero),
        "BasePolicy": tasks.BasePolicy(dataset="few"),
        "Train": tasks.Train(dataset="few"),
    }


WITH_MODEL = ("BasePolicy", "Train")


def preload(stages_: Iterable[Any]) -> None:
    """Import what the stages need, so that a fork begins with its work."""
    for stage in stages_:
        importlib.import_module(stage.module)


def start(work: Callable[[], None]) -> int:
    """Fork a process group of its own that does `work`; returns its id. Exit code 1: an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        log = os.open("attempts.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        code = 0
    except BaseException as error:
        _note(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note(error: BaseException) -> None:
    from pipeline.artifacts.store import StageFailed

    if isinstance(error, StageFailed):
        Path("sentence.txt").write_text(str(error))
    else:
        Path("sentence.txt").write_text(traceback.format_exc())
    print(Path("sentence.txt").read_text(), flush=True)


def run(stage: Any, limit: float = 240) -> str:
    """Run a stage to its end; returns the sentence it failed with, or ""."""
    Path("sentence.txt").unlink(missing_ok=True)
    process = start(lambda: build(stage))
    if wait(process, limit) is None:
        kill(process)
        return f"still at work after {limit} s"
    sentence = Path("sentence.txt")
    return sentence.read_text() if sentence.exists() else ""


def wait(process: int, limit: float) -> int | None:
    """The exit code, or None after `limit` seconds."""
    descriptor = os.pidfd_open(process)
    try:
        if not select.select([descriptor], [], [], max(0, limit))[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int) -> None:
    """kill -9 of a process with its whole group."""
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(process, 0)


def build(stage: Any) -> None:
    """What a Luigi worker does with a stage, with children that are forked."""
    from pipeline.artifacts import child

    child.subprocess = _Forking  # type: ignore[assignment]
    child.POLL = 0.05
    stage.run()


class _Forked:
    """As much of subprocess.Popen as pipeline/artifacts/child.py needs; `python -m MODULE CONFIG` forked."""

    def __init__(self, command: list[str], *, pass_fds: Any, env: dict[str, str], **_: Any):
        module = importlib.import_module(command[2])
        ours, theirs = zip(os.pipe(), os.pipe(), strict=True)
        self.pid = os.fork()
        if self.pid == 0:
            _become(module, command, env, theirs)
        for end in theirs:
            os.close(end)
        self.stdout, self.stderr = (os.fdopen(end, "rb", 0) for end in ours)
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


class _Forking:
    """Stands for the module `subprocess`."""

    PIPE = subprocess.PIPE
    Popen = _Forked


def _become(module: Any, command: list[str], env: dict[str, str], ends: tuple[int, ...]) -> None:
    code = 1
    try:
        for number, end in enumerate(ends, start=1):
            os.dup2(end, number)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = command[2:]
        from tasks.runtime.command import main

        if module.__name__ == "tasks.download":
            module.IMAGES_PER_SHARD = IMAGES_PER_SHARD
        name = FUNCTIONS.get(module.__name__, module.__name__.rpartition(".")[2])
        main(getattr(module, name))
        code = 0
    except SystemExit as end_:
        code = end_.code if isinstance(end_.code, int) else 1
        if isinstance(end_.code, str):
            print(end_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file that must come out alike, by name."""
    from tasks.tables.shards import sha256_file

    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


def rows(folder: Path) -> dict[str, int]:
    """Rows of every table in a folder, by file."""
    import pyarrow.parquet as pq

    return {path.name: pq.read_metadata(path).num_rows for path in folder.glob("*.parquet")}


def discard(stage: Any) -> None:
    """Delete a stage's artifact."""
    from pipeline.artifacts import store

    if stage.folder.exists():
        store.remove(stage.folder)
    (stage.folder.parent / "current").unlink(missing_ok=True)


def leftovers(stage: Any) -> list[str]:
    """Names beside an artifact that do not belong there."""
    names = {path.name for path in stage.folder.parent.iterdir()}
    return sorted(names - {stage.folder.name, "current"})


def timed(stages_: list[Any]) -> Iterator[tuple[Any, float, dict[str, str]]]:
    """Each stage, run to its end: (stage, seconds, contents)."""
    for stage in stages_:
        started = time.monotonic()
        if sentence := run(stage):
            raise RuntimeError(f"{stage.task_family} fails unbroken: {sentence}")
        yield stage, time.monotonic() - started, contents(stage.folder)


def make_writable(folder: Path) -> None:
    """So that it can be deleted."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink() and path.exists():
            path.chmod(path.stat().st_mode | 0o700)
