"""Files that survive a power failure: written whole, synced to disk, and checked by sha256."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all, also after a power failure."""
    data = text.encode("utf-8")  # raises before there is a file
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync_tree(folder: Path, besides: Sequence[str] = ()) -> None:
    """Sync everything below a folder to disk, files before the folders that name them.

    The subfolders named in `besides` are left out: other processes may still write there.
    """
    left_out = [folder / name for name in besides]
    entries = [
        path
        for path in folder.rglob("*")
        if not path.is_symlink() and not any(path.is_relative_to(other) for other in left_out)
    ]
    for path in [p for p in entries if p.is_file()]:
        sync(path)
    for path in [*(p for p in entries if p.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Sync a file's bytes, or the names in a folder, to disk.

    fsync of a file leaves out its name. So a new file needs a sync of its folder as well, before
    anything is written that depends on it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
