"""Turns a stage's function into a command: `python -m tasks.propose recipe.json`.

The recipe holds the function's keyword arguments as JSON, `output` among them. Every artifact keeps
its recipe, so that its stage can be run again by hand.
"""

import argparse
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from tasks.runtime.errors import USER_ERRORS, StageError, Stopped, sentence
from tasks.runtime.interrupts import end_with_parent, shard_by_shard, stop_when_asked
from tasks.runtime.memory import Watch, own_peak
from tasks.runtime.progress import Bar
from tasks.runtime.protocol import (
    DONE_FILE,
    ERROR_FILE,
    PROGRESS_FILE,
    SCRATCH,
    STOPPED,
    remove_scratch,
)
from tasks.runtime.settings import Settings, converted, mistyped, rules
from tasks.tables.durable import sync_tree, write_text


def main(function: Callable[..., None], short: bool = False) -> None:
    """Read the recipe.json named on the command line and call `function` with it.

    A `short` stage takes seconds and has no shards, so Ctrl-C lets it finish. An error that the user
    can mend ends in exit code 1 and one sentence: on standard error, and in `error.txt` in the
    output folder for the parent process. Any other error is a bug and keeps its traceback.
    """
    parser = argparse.ArgumentParser(
        description=(function.__doc__ or "").strip().splitlines()[0],
        epilog="An artifact's own recipe.json shows every key: copy it, change it, run it.",
    )
    parser.add_argument("recipe", type=Path, metavar="recipe.json", help="keyword arguments, JSON")
    path = parser.parse_args().recipe
    end_with_parent()
    stop_when_asked()
    quiet_libraries()
    name = function.__name__
    try:
        arguments = load_arguments(function, path)
        output: Path = arguments["output"]
        output.mkdir(parents=True, exist_ok=True)
        (output / ERROR_FILE).unlink(missing_ok=True)
        Bar.file = output / PROGRESS_FILE
        gc.freeze()  # imported modules stay: the garbage collector need not visit them again
        gc.enable()  # `training` disables it while they are imported
        with shard_by_shard("stage") if short else nullcontext(), Watch(os.getpid()) as memory:
            function(**arguments)
            # Of several processes under a launcher, only the first writes.
            if os.environ.get("RANK", "0") == "0":
                _mark_done(output, max(memory.peak, own_peak()))
                remove_scratch(output)
    except (Stopped, KeyboardInterrupt):
        print(f"{name}: stopped; the same command goes on from here", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STOPPED)  # without waiting for running threads
    except BaseException as error:
        if Bar.shown is not None:  # or it would be drawn once more, after the error
            Bar.shown.close()
        message = sentence(error) if isinstance(error, USER_ERRORS) else None
        if message is None:
            raise
        with suppress(OSError, NameError):  # on a full disk the message below has to do
            (output / ERROR_FILE).write_text(f"{message}\n", encoding="utf-8")
        sys.exit(f"{name}: {message}")


def _mark_done(output: Path, memory: float) -> None:
    """Record that the output is complete: a run that is cut off after this only has to commit.

    `memory` is the peak in MB of this process and its descendants.
    """
    sync_tree(output, besides=SCRATCH)
    write_text(output / DONE_FILE, json.dumps({"peak_memory_mb": memory}))


def load_arguments(function: Callable[..., None], path: Path) -> dict[str, Any]:
    """The keyword arguments in a JSON file. Raises StageError for an unknown or missing key."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of JSON, or of UTF-8
        raise StageError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path} must hold an object, key -> value, as an artifact's recipe.json")
    try:
        return bind(function, values)
    except (KeyError, StageError) as error:
        raise StageError(f"{path}: {error.args[0]}") from error


def bind(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Convert values by name to the keyword arguments of a function, or of a Settings dataclass.

    An argument whose type is a Settings dataclass takes either one value of its own name, or the
    values of its fields, which then stand among the others. Raises KeyError with a sentence for an
    unknown or missing name, and StageError for a value that is not allowed.
    """
    hints = get_type_hints(function)
    bound, known = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(name)
        flat = settings_kind(kind) if name not in values else None
        own = list(rules(flat)) if flat else [name]
        known += own
        # A setting that a later version added has a default, so that older recipes can still be run.
        spared = {f.name for f in fields(flat) if f.default is not MISSING} if flat else set()
        if missing := [
            key
            for key in own
            if key not in values and key not in spared and parameter.default is parameter.empty
        ]:
            raise KeyError(f"key {missing[0]!r} is missing")
        if flat:
            bound[name] = flat.of(values)
        elif name in values:
            bound[name] = _typed(name, values[name], kind)
    if unknown := sorted(set(values) - set(known)):
        raise KeyError(f"unknown key {unknown[0]!r}; known: {', '.join(known)}")
    return bound


def settings_kind(kind: Any) -> type[Settings] | None:
    """The Settings class that an argument's annotation names; None for any other."""
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _typed(name: str, value: Any, kind: Any) -> Any:
    settings = settings_kind(kind)
    if settings and isinstance(value, dict):
        return settings(**bind(settings, value))
    typed = converted(value, kind)
    if problem := kind and mistyped(typed, kind):
        raise StageError(f"key {name!r} {problem}")
    return typed


@contextmanager
def importing() -> Iterator[None]:
    """Within this, import large libraries. It takes a fifth less time while no garbage is collected.

    What was imported stays, so the garbage collector need not visit it again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Silence the libraries' start-up messages, unless a variable already sets their level."""
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
