"""Working folders of runs that were cut off: which ones `gc` keeps, and which it deletes.

A later run with the same settings resumes from such a folder, so `gc` keeps it until nothing has
been written to it for some days. It always keeps a folder that a run is working on.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import lock, store
from pipeline.artifacts.store import DELETED, PARTIAL

DAYS = 7.0


@dataclass(frozen=True)
class Leftover:
    """A working folder: its size, the days since the last write, whether `gc` keeps it, and why."""

    folder: Path
    bytes: int
    days: float
    kept: bool
    why: str


def leftovers(root: Path, older_than: float = DAYS) -> list[Leftover]:
    """Every working folder below `root`; `older_than` is how many days without a write one is kept."""
    result = []
    for folder in sorted(_folders(root)):
        size, days = _measure(folder)
        kept, why = _judge(folder, days, older_than)
        result.append(Leftover(folder, size, days, kept, why))
    return result


def remove(leftover: Leftover) -> bool:
    """Delete a working folder, unless a run has resumed it meanwhile. Returns whether it is gone."""
    if leftover.folder.suffix == DELETED:
        store.remove(leftover.folder)
        return True
    try:
        with lock.held(store.lock_of(_final(leftover.folder)), patience=0):
            if leftover.folder.exists():  # else a run has just committed it
                store.remove(leftover.folder)
    except lock.Busy:
        return False
    return True


def _judge(folder: Path, days: float, older_than: float) -> tuple[bool, str]:
    """Whether `gc` keeps a working folder, and why."""
    if folder.suffix == DELETED:
        return False, "its deletion was cut off"
    final = _final(folder)
    if holder := store.worked_on_by(final):
        return True, f"{holder} is at work on it"
    if final.exists():
        return False, "its artifact is there"
    if days < older_than:
        return (
            True,
            f"a run with its settings goes on from it; it stays until it is {older_than:g} days old",
        )
    return False, f"nothing was written to it for {older_than:g} days"


def _folders(root: Path) -> Iterator[Path]:
    for pattern in (f"*{PARTIAL}", f".*{DELETED}"):
        for folder in root.rglob(pattern):
            above = {parent.suffix for parent in folder.relative_to(root).parents}
            if folder.is_dir() and not folder.is_symlink() and not above & {PARTIAL, DELETED}:
                yield folder


def _final(partial: Path) -> Path:
    """The artifact folder that a working folder would be renamed to."""
    return partial.with_suffix("")


def _measure(folder: Path) -> tuple[int, float]:
    """A folder's size in bytes, and the days since anything in it was written."""
    size, newest = 0, 0.0
    for path in [folder, *folder.rglob("*")]:
        try:
            facts = path.lstat()
        except FileNotFoundError:  # a run that works on it has just deleted it
            continue
        size += facts.st_size if path.is_file() else 0
        newest = max(newest, facts.st_mtime)
    return size, max(0.0, time.time() - newest) / 86400
