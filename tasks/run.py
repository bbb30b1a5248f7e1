"""How a stage's function becomes a command: `python -m tasks.propose CONFIG.json`.

The configuration is the function's keyword arguments as JSON, `output` among them. Every artifact
keeps the one it was made from, so that a stage can be run again by hand.
"""

import argparse
import gc
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_type_hints

from tqdm import tqdm

from data_cards import CardError
from tasks.shards import ShardError

ERROR_FILE = "error.txt"


class StageError(Exception):
    """A stage cannot go on; the message is one sentence: what, where, how to mend it."""


def main(function: Callable[..., None]) -> None:
    """Read the configuration named on the command line and call `function` with it.

    A mistake that the user can mend ends in one sentence on standard error, in `error.txt` beside
    the output for whoever started this process, and exit code 1. Anything else is a bug and keeps
    its traceback.
    """
    parser = argparse.ArgumentParser(
        description=(function.__doc__ or "").strip().splitlines()[0],
        epilog="An artifact's own recipe.json shows every key: copy it, change it, run it.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.json", help="keyword arguments, JSON")
    path = parser.parse_args().config
    end_with_parent()
    quiet_libraries()
    try:
        arguments = load_arguments(function, path)
    except StageError as error:
        sys.exit(f"{function.__name__}: {error}")
    output: Path = arguments["output"]
    output.mkdir(parents=True, exist_ok=True)
    (output / ERROR_FILE).unlink(missing_ok=True)
    gc.freeze()  # what is imported by now stays: the collector need not walk it again and again
    try:
        function(**arguments)
    except (StageError, CardError, ShardError) as error:
        (output / ERROR_FILE).write_text(f"{error}\n", encoding="utf-8")
        sys.exit(f"{function.__name__}: {error}")


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
    (output / "stats.json").write_text(json.dumps(stats, indent=1), encoding="utf-8")


def progress(
    items: Iterable[Any] | None, *, desc: str, total: int | None, unit: str, done: int = 0
) -> tqdm:
    """The one progress bar: rate and time left on a terminal, a line every 15 s in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 15
    return tqdm(
        items,
        desc=desc,
        total=total,
        initial=done,
        unit=f" {unit}",
        mininterval=interval,
        dynamic_ncols=True,
        smoothing=0.1,
    )


def end_with_parent(group: bool = False) -> None:
    """End when the run that started this process is gone: a killed run must not go on working.

    With `group` the whole process group ends, which must then be this process's own.
    """
    parent = os.environ.get("DIVE_PARENT")
    if parent is None or os.getppid() != int(parent):
        return  # started by hand, or below a launcher that watches its own children

    def watch() -> None:
        while os.getppid() == int(parent):
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
