"""How a stage's function becomes a command: `python -m tasks.propose CONFIG.json`.

The configuration is the function's keyword arguments as JSON, `output` among them. Every artifact
keeps the one it was made from, so that a stage can be run again by hand.
"""

import argparse
import errno
import gc
import inspect
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from data_cards import CardError
from tasks.bar import PROGRESS_FILE, Bar
from tasks.bar import progress as progress
from tasks.memory import Watch, own_peak
from tasks.shards import ShardError, sync_tree, write_text

ERROR_FILE = "error.txt"
STATS_FILE = "stats.json"
SCRATCH = ("checkpoints", "cache")  # folders that only going on after a kill needs
DONE_FILE = ".done"  # the function has ended well, and all it wrote is on disk
STOPPED = 130  # exit code of a stage that was asked to stop, and did
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class StageError(Exception):
    """A stage cannot go on; the message is one sentence: what, where, how to mend it."""


class Stopped(Exception):
    """The stage was asked to stop, and has finished the shard it was at."""


def main(function: Callable[..., None], short: bool = False) -> None:
    """Read the configuration named on the command line and call `function` with it.

    A `short` stage takes seconds and has no shards: asked to stop, it is finished first. A mistake
    that the user can mend ends in one sentence on standard error, in `error.txt` beside the output
    for whoever started this process, and exit code 1. Anything else is a bug and keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        description=(function.__doc__ or "").strip().splitlines()[0],
        epilog="An artifact's own recipe.json shows every key: copy it, change it, run it.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="keyword arguments, JSON")
    path = parser.parse_args().config
    end_with_parent()
    _stop_when_asked()
    quiet_libraries()
    name = function.__name__
    try:
        arguments = load_arguments(function, path)
        output: Path = arguments["output"]
        output.mkdir(parents=True, exist_ok=True)
        (output / ERROR_FILE).unlink(missing_ok=True)
        Bar.file = output / PROGRESS_FILE
        gc.freeze()  # what is imported by now stays: the collector need not walk it again and again
        with shard_by_shard("stage") if short else nullcontext(), Watch(os.getpid()) as memory:
            function(**arguments)
            # Of several processes under a launcher the others write nothing.
            if os.environ.get("RANK", "0") == "0":
                _mark_done(output, max(memory.peak, own_peak()))
                remove_scratch(output)
    except (Stopped, KeyboardInterrupt):
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STOPPED)  # without waiting for threads that are at work
    except (StageError, CardError, ShardError, OSError, MemoryError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        with suppress(OSError, NameError):  # where the disk is full the words below must do
            (output / ERROR_FILE).write_text(f"{sentence}\n", encoding="utf-8")
        sys.exit(f"{name}: {sentence}")


def _mark_done(output: Path, memory: float) -> None:
    """Leave word that all is there, so that a run which is cut off from here on only commits.

    `memory` is the peak, in MB, of this process and of those it has started.
    """
    sync_tree(output, besides=SCRATCH)
    write_text(output / DONE_FILE, json.dumps({"peak_memory_mb": memory}))


def remove_scratch(output: Path) -> None:
    """Delete what nobody needs once the word is left that all is there."""
    for name in SCRATCH:
        shutil.rmtree(output / name, ignore_errors=True)


def _sentence(error: BaseException) -> str | None:
    """What a person can do about an error; None for a bug."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; run it where there is more, or lower its batch"
    if not isinstance(error, OSError):
        return str(error)
    said = f"{error.filename}: {error.strerror}" if error.filename else first_line(error)
    if error.errno in FULL:
        return f"{said}; make room and run again, finished shards are kept"
    return f"{said}; make it accessible and run again" if error.errno in FORBIDDEN else None


class _Stop:
    """Whether this process was asked to stop, and what it is in the middle of, outermost first."""

    asked = False
    units: ClassVar[list[str]] = []


def _stop_when_asked() -> None:
    """Once: at the end of the shard, where the work is done in shards. Twice: at once.

    A person presses Ctrl-C; whoever started this process hears it too, and says so by SIGUSR1.
    Where nothing is begun that could be finished, as while a model is loaded, once is enough.
    """

    def ask(*_: Any) -> None:
        if _Stop.asked:
            os._exit(STOPPED)  # engines in processes of their own see it and end themselves
        _Stop.asked = True
        if not _Stop.units:
            raise KeyboardInterrupt
        # Not by print: the signal may come in the middle of one.
        os.write(2, f"stopping after this {_Stop.units[-1]}\n".encode())

    started_by_hand = "DIVE_PARENT" not in os.environ
    signal.signal(signal.SIGINT, ask if started_by_hand else signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, ask)


@contextmanager
def shard_by_shard(unit: str = "shard") -> Iterator[None]:
    """Work that looks at `stop_asked` after each shard, or calls `stop_if_asked`.

    `unit` is what a shard is called here: a step of training, or the whole of a short stage.
    """
    _Stop.units.append(unit)
    try:
        yield
    finally:
        _Stop.units.pop()


def stop_asked() -> bool:
    """Whether to begin no further shard."""
    return _Stop.asked


def stop_if_asked() -> None:
    """Raises Stopped, after a shard is on disk, if the run was asked to stop."""
    if _Stop.asked:
        raise Stopped


def load_arguments(function: Callable[..., None], path: Path) -> dict[str, Any]:
    """The keyword arguments in a JSON file, checked against the function's signature."""
    try:
        arguments = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(f"cannot read the configuration {path}: {error}") from error
    signature = inspect.signature(function).parameters
    required = {n for n, p in signature.items() if p.default is p.empty}
    if unknown := sorted(set(arguments) - set(signature)):
        raise StageError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(signature)}")
    if missing := sorted(required - set(arguments)):
        raise StageError(f"{path}: key {missing[0]!r} is missing")
    hints = get_type_hints(function)
    return {name: _as_path(value, hints.get(name)) for name, value in arguments.items()}


def _as_path(value: Any, kind: Any) -> Any:
    if kind == list[Path]:
        return [Path(item) for item in value]
    return Path(value) if kind in (Path, Path | None) and value is not None else value


def first_line(error: BaseException) -> str:
    """What an error says, on one line and not too long; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def save_stats(output: Path, stats: dict[str, Any]) -> None:
    """Write a stage's counts, `stats.json`; they go into its manifest as well."""
    write_text(output / STATS_FILE, json.dumps(stats, indent=1))


def end_with_parent(group: bool = False) -> None:
    """End when the run that started this process is gone: a killed run must not go on working.

    With `group` the whole process group ends, which must then be this process's own.
    """
    if "DIVE_PARENT" not in os.environ:
        return  # started by hand
    parent, starter = int(os.environ["DIVE_PARENT"]), os.getppid()

    def lives() -> bool:
        if os.getppid() != starter:
            return False
        try:  # below a launcher, which may outlive the run that started it
            os.kill(parent, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def watch() -> None:
        while lives():
            time.sleep(0.5)
        if group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet_libraries() -> None:
    """Progress and errors are ours to print; the libraries' start-up chatter is not news."""
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
