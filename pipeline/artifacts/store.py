"""How an artifact is built: lock, resume, child process, manifest, one rename.

A stage writes to `<fingerprint>.partial/`. When the child has ended well and every file is on disk,
the manifest is written and the folder renamed. So a folder named by a fingerprint is complete.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.artifacts import child, lock
from pipeline.artifacts.folders import (
    DELETED,
    MANIFEST,
    PARTIAL,
    RECIPE,
    SPENT,
    commit,
    disk_sentence,
    lock_of,
    make_writable,
    partial_of,
    point_at,
    remove,
    seal_is_broken,
    sweep,
    worked_on_by,
)
from pipeline.artifacts.host import host, versions
from tasks.runtime.errors import StageError
from tasks.runtime.protocol import DONE_FILE, ERROR_FILE
from tasks.tables import manifest as manifests
from tasks.tables.manifest import Manifest

# The artifact store has this one door.
__all__ = [
    "DELETED",
    "MANIFEST",
    "PARTIAL",
    "RECIPE",
    "StageFailed",
    "build",
    "commit",
    "host",
    "lock_of",
    "manifest_of",
    "partial_of",
    "point_at",
    "read_manifest",
    "remove",
    "seal_is_broken",
    "spent",
    "starter",
    "sweep",
    "versions",
    "worked_on_by",
]

LOCK_PATIENCE = lock.PATIENCE


class StageFailed(Exception):
    """A stage did not produce its artifact. The message says what a person needs to know."""


def build(
    folder: Path,
    module: str,
    arguments: dict[str, Any],
    manifest: dict[str, Any],
    environment: dict[str, str] | None = None,
    *,
    launcher: str = "",
    patience: float | None = None,
    on_progress: child.ProgressListener | None = None,
) -> None:
    """Make the artifact `folder` by `python -m module RECIPE`; resume a working folder if there is one.

    Args:
        arguments: the stage function's keyword arguments, without `output`.
        manifest: the identity to record.
        environment: variables added to the child's environment.
        launcher: the command that starts the module in place of Python, such as `accelerate launch`.
        patience: seconds to wait for another process that builds the same artifact.
        on_progress: called with the child's progress about once a second.

    Raises StageFailed with one sentence, and KeyboardInterrupt when Ctrl-C stopped the build.
    """
    partial = partial_of(folder)
    patience = LOCK_PATIENCE if patience is None else patience
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with lock.held(lock_of(folder), patience) as ours:
            if folder.exists():
                return
            before = _prepare(partial, arguments)
            started = time.monotonic()
            command = [*starter(launcher), "-m", module, str(partial / RECIPE)]
            ended = _run_child(command, partial, ours, manifest, environment or {}, on_progress)
            seconds = before + time.monotonic() - started
            if not ours.still_ours():
                raise StageFailed(
                    f"{folder}: another machine took this work over, having seen no sign of life for "
                    f"{lock.STALE:.0f} s; run again when it is done"
                )
            manifest = {
                **manifest,
                "seconds": round(seconds, 1),
                "peak_memory_mb": round(ended.memory),
                "command": f"{launcher or 'python'} -m {module} {folder / RECIPE}",
            }
            commit(partial, folder, manifest)
    except lock.Busy as error:
        raise StageFailed(f"{error} is already building {folder}; wait for it, or end it") from None
    except OSError as error:
        raise StageFailed(f"{manifest['stage']} failed: {disk_sentence(error, folder)}") from error
    if ended.stopped:
        raise KeyboardInterrupt


def spent(partial: Path) -> float:
    """The seconds of all earlier attempts, except those whose end could not be recorded."""
    try:
        return float(_read(partial / SPENT) or 0)
    except ValueError:  # cut off while it was written
        return 0.0


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a committed artifact. Raises StageFailed when it cannot be read."""
    try:
        return Manifest.of(read_manifest(folder))
    except StageError as error:
        raise StageFailed(f"{folder}: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The same as JSON values."""
    try:
        return manifests.read_values(folder / MANIFEST)
    except StageError as error:
        raise StageFailed(str(error)) from error


def starter(launcher: str) -> list[str]:
    """The words of the command that starts a stage. Raises StageFailed for an unknown launcher.

    A launcher is looked for beside this Python first, then on PATH.
    """
    words = shlex.split(launcher)
    if not words:
        return [sys.executable]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(words[0], path=path)
    if program is None:
        raise StageFailed(f"there is no command {words[0]!r} to launch the stage with")
    return [program, *words[1:]]


def _prepare(partial: Path, arguments: dict[str, Any]) -> float:
    """Create the working folder and its recipe. Returns the seconds of earlier attempts."""
    partial.mkdir(exist_ok=True)
    if (partial / MANIFEST).exists():  # an earlier run was cut off during commit: files are frozen
        make_writable(partial)
        if not (partial / DONE_FILE).exists():  # commit deletes it once the manifest is whole
            before = read_manifest(partial)
            if before.get("files"):
                summary = {"peak_memory_mb": before.get("peak_memory_mb", 0)}
                (partial / DONE_FILE).write_text(json.dumps(summary))
        (partial / MANIFEST).unlink()
    recipe = partial / RECIPE
    recipe.write_text(json.dumps({"output": str(partial), **arguments}, indent=1))
    return spent(partial)


def _run_child(
    command: list[str],
    partial: Path,
    ours: lock.Lock,
    manifest: dict[str, Any],
    environment: dict[str, str],
    on_progress: child.ProgressListener | None,
) -> child.Ended:
    """Run the stage in a process of its own. Raises StageFailed when it does not end well."""
    if (partial / DONE_FILE).exists():  # an earlier run was cut off during commit
        return child.Ended(0, _recorded_memory(partial), (), "", False)
    (partial / ERROR_FILE).unlink(missing_ok=True)
    started = time.monotonic()
    try:
        # The child inherits the lock: while it lives, nobody else works in this folder.
        ended = child.run(
            command, partial, environment, inherited=ours.descriptor, on_progress=on_progress
        )
    except KeyboardInterrupt:
        _add_spent(partial, time.monotonic() - started)
        raise
    if ended.code == 0:
        # The child's own figure includes its last second. Ours includes all processes of a launcher.
        return dataclasses.replace(ended, memory=max(ended.memory, _recorded_memory(partial)))
    _add_spent(partial, time.monotonic() - started)
    stage = manifest["stage"]
    if ended.code < 0:
        finished = len(list(partial.glob("*.parquet")))
        name = signal.Signals(-ended.code).name
        raise StageFailed(
            f"{stage} was killed by {name} after {ended.memory:.0f} MB of memory at most and "
            f"{finished} finished shards in {partial}; the same command goes on from there"
        )
    raise StageFailed(f"{stage} failed: {_sentence(partial, ended)}")


def _recorded_memory(partial: Path) -> float:
    """The peak memory in MB that the child recorded at its end; 0 without a record."""
    return float(json.loads(_read(partial / DONE_FILE) or "{}").get("peak_memory_mb", 0))


def _sentence(partial: Path, ended: child.Ended) -> str:
    """The error sentence that the child left; for a bug, the exception and the end of its log."""
    if sentence := _read(partial / ERROR_FILE).strip():
        return sentence
    said = [line for line in ended.last_lines if not child.BAR.search(line)]
    if ended.code == 1 and said and re.match(r"[a-z_]+: ", said[-1]):
        return said[-1].partition(": ")[2]  # the disk was too full for the file
    what = f"{ended.exception} " if ended.exception else ""
    lines = "\n    ".join(ended.last_lines[1:] if len(ended.last_lines) > 1 else ended.last_lines)
    log = partial / child.LOG
    return f"{what}(exit code {ended.code}; the log is {log}, and ends so):\n    {lines}"


def _add_spent(partial: Path, seconds: float) -> None:
    with suppress(OSError):
        (partial / SPENT).write_text(json.dumps(spent(partial) + seconds))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
