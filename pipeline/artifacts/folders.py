"""An artifact's folder on disk: its names, how it is committed and frozen, and how it is deleted."""

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from pipeline.artifacts import lock
from pipeline.artifacts.host import host, versions
from tasks.runtime.protocol import DONE_FILE, ERROR_FILE, PROGRESS_FILE, STATS_FILE, remove_scratch
from tasks.tables.durable import sha256_file, sync, sync_tree
from tasks.tables.manifest import FILE as MANIFEST
from tasks.tables.manifest import VERSION

RECIPE = "recipe.json"  # the child's keyword arguments; config.json belongs to model folders
SPENT = ".spent"  # the seconds that earlier attempts took
PARTIAL, DELETED = ".partial", ".deleted"  # suffixes: a working folder, a folder being deleted
WORKING = (ERROR_FILE, SPENT, PROGRESS_FILE)  # files that only a working folder holds


def partial_of(folder: Path) -> Path:
    """The working folder of the artifact `folder`."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def lock_of(folder: Path) -> Path:
    """The lock file that a process holds while it builds the artifact `folder`."""
    return folder.with_name(f"{folder.name}.lock")


def worked_on_by(folder: Path) -> str:
    """The lock holder of the artifact `folder`; empty when nobody builds it now."""
    return lock.holder(lock_of(folder))


def commit(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, sync every file to disk, make all read-only, and rename to `folder`."""
    remove_scratch(partial)
    strays = [partial / name for name in WORKING]
    for stray in [*partial.rglob("*.tmp"), *strays]:
        stray.unlink(missing_ok=True)
    recipe = partial / RECIPE
    if recipe.exists():
        recipe.write_text(recipe.read_text().replace(str(partial), str(folder)))
    paths = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*"))}
    ours = (MANIFEST, DONE_FILE)
    files = {name: path for name, path in paths.items() if path.is_file() and name not in ours}
    described = {name: _describe(path) for name, path in files.items()}
    stats = partial / STATS_FILE
    manifest = {
        "manifest_version": VERSION,
        **manifest,
        "files": described,
        "rows": _rows_by_table(described),
        "stats": json.loads(stats.read_text(encoding="utf-8")) if stats.exists() else {},
        "versions": versions(),
        "host": host(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # Written before anything is frozen: a manifest in a working folder means that files may be
    # read-only.
    (partial / MANIFEST).write_bytes(sealed(manifest))
    sync_tree(partial)
    (partial / DONE_FILE).unlink(missing_ok=True)  # only now: the manifest has taken its place
    for path in [*files.values(), partial / MANIFEST]:
        _set_mode(path, 0o444)
    for path in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
        path.chmod(0o555)
    os.rename(partial, folder)
    sync(folder.parent)
    point_at(folder)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as JSON that ends with a sha256 of itself."""
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64}, indent=1, ensure_ascii=False)
    return _with_digest(text.encode("utf-8", "backslashreplace"))


def seal_is_broken(data: bytes) -> bool:
    """Whether a manifest's bytes differ from those written. Version 1 has no seal to break."""
    values = json.loads(data)
    digest = str(values.get("manifest_sha256", ""))
    if not digest:
        return "manifest_version" in values
    start = data.rfind(digest.encode())
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return _with_digest(blank) != data


def _with_digest(blank: bytes) -> bytes:
    digest = hashlib.sha256(blank).hexdigest().encode()
    head, _, tail = blank.rpartition(b"0" * 64)
    return head + digest + tail


def point_at(folder: Path) -> None:
    """Make the link `current` beside `folder` lead to it, in one step."""
    link = folder.parent / "current"
    if link.is_symlink() and os.readlink(link) == folder.name:
        return
    fresh = link.with_name(f".current-{folder.name}")  # always the same: a later run replaces it
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name)
        os.replace(fresh, link)
    except (FileExistsError, FileNotFoundError):  # another process does the same just now
        return


def sweep(folder: Path) -> None:
    """Delete the lock files of a run that was killed just after it committed `folder`."""
    for name in (f"{folder.name}.lock", f".{folder.name}.lock-*"):
        for stray in folder.parent.glob(name):
            stray.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete an artifact or working folder, read-only or not.

    The folder is renamed first, so that a half-deleted one passes for neither.
    """
    doomed = folder
    if folder.suffix != DELETED:
        doomed = folder.with_name(f".{folder.name}{DELETED}")
        if doomed.exists():
            remove(doomed)
        os.rename(folder, doomed)
    make_writable(doomed)
    shutil.rmtree(doomed)


def make_writable(folder: Path) -> None:
    """Let the owner write to everything in a folder."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            _set_mode(path, path.stat().st_mode | stat.S_IWUSR)


def _set_mode(path: Path, mode: int) -> None:
    """Change a file's mode, unless the file has further hard links.

    A mode belongs to the file and not to the name. The other name may be a user's own model, which
    must not become read-only, or a file of another artifact, which must stay read-only. Whoever
    writes into a working folder again gives the name to a new file first.
    """
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode) or facts.st_nlink == 1:
        path.chmod(mode)


def disk_sentence(error: OSError, folder: Path) -> str:
    """What a failed write means, and how the user mends it."""
    path = error.filename or folder
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{path}: {reason}; make room and run again, finished shards are kept"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{path}: {reason}; make it writable, or set [run] artifacts to a folder that is"
    return f"{path}: {reason}"


def _describe(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq  # slow to import, and `status` does without

        facts["rows"] = pq.read_metadata(path).num_rows
    return facts


def _rows_by_table(described: dict[str, dict[str, Any]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for name, facts in described.items():
        if "rows" in facts:
            table = name.removesuffix(".parquet").rstrip("0123456789").rstrip("-")
            rows[table] = rows.get(table, 0) + facts["rows"]
    return rows
