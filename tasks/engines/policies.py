"""A policy given by name: a folder, an artifact of this pipeline, or a model of the hub.

`FOLDER` holds a model that transformers loads. `owner/name` or `owner/name@revision` is a model of
the Hugging Face hub.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tasks.runtime.errors import StageError, first_line

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WHOLE = 1 << 20  # bytes; of a larger file only samples are read
_SAMPLES, _SAMPLE = 64, 1 << 16


LOADING = ("", "vllm", "ray", "transformers")  # backends that load a policy; "": any may


class PolicyError(StageError, ValueError):
    """A policy that is not there or is none; the message says what was looked for."""


def absolute(policy: str) -> str:
    """A folder's full path; a hub id as it is."""
    folder = Path(policy).expanduser()
    return str(folder.resolve()) if folder.is_dir() else policy


def name(policy: str) -> str:
    """A folder name for what belongs to this policy."""
    folder = Path(policy).expanduser()
    shown = folder.resolve().name if folder.is_dir() else policy
    if made := manifest(folder):
        shown = f"{made['stage']}-{made['fingerprint']}"
    return re.sub(r"[^\w.@-]+", "--", shown)


def identity(policy: str) -> str:
    """What tells it from others: an artifact's fingerprint, a folder's digest, or the hub id.

    Of files above a megabyte evenly spaced samples are read: training changes weights everywhere.
    Raises PolicyError when it is neither a folder with a model nor a hub id.
    """
    folder = _folder(policy)
    if folder is None:
        return policy
    if made := manifest(folder):
        return made["fingerprint"]
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def local(policy: str | Path, backend: str = "") -> Path:
    """The policy's folder; a model of the hub is downloaded, or found where it was downloaded to.

    Only the backends that load a model here need it: a server has its own, and what a
    `module:function` needs is its own business. Raises PolicyError when it cannot be had.
    """
    if Path(policy).is_dir() or backend not in LOADING:
        return Path(policy)
    _folder(str(policy))
    from huggingface_hub import snapshot_download

    repo, _, revision = str(policy).partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None))
    except Exception as error:  # the hub's client raises its own, the network's and the disk's
        raise PolicyError(
            f"policy {policy}: no such folder, and the hub's model cannot be had "
            f"({first_line(error)})"
        ) from error


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a policy that is an artifact; empty for any other."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def recipe(folder: Path) -> dict[str, Any]:
    """How a policy that is an artifact was trained; empty for any other."""
    path = folder / "recipe.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _folder(policy: str) -> Path | None:
    """The folder with a model in it, or None for a hub id."""
    folder = Path(policy).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder.resolve()
        adapter = (folder / "adapter_config.json").is_file()
        hint = "it holds an adapter: name it in [engine] lora" if adapter else "no config.json"
        raise PolicyError(f"{folder} is not a model's folder ({hint})")
    if _HUB_ID.fullmatch(policy):
        return None
    raise PolicyError(f"policy {policy}: no such folder, and no hub id (owner/name)")
