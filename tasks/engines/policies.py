"""Resolves a policy's name to a folder: a model's folder, an artifact, or a model of the hub.

A name is either a folder with a model that transformers loads, or `owner/name` or
`owner/name@revision` of the Hugging Face hub.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_cards import Card
from tasks.language import prompts
from tasks.runtime.errors import StageError, first_line
from tasks.tables import manifest

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_READ_WHOLE = 1 << 20  # bytes; larger files are sampled
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16

LOADING = ("", "vllm", "ray", "transformers")  # backends that load a policy; "": not known which


class PolicyError(StageError, ValueError):
    """There is no such policy. The message says where it was looked for."""


def absolute(policy: str) -> str:
    """The full path of a policy's folder; a hub id unchanged."""
    folder = Path(policy).expanduser()
    return str(folder.resolve()) if folder.is_dir() else policy


def name(policy: str) -> str:
    """A name for the folder that holds this policy's evaluations."""
    folder = Path(policy).expanduser()
    shown = folder.resolve().name if folder.is_dir() else policy
    if record := artifact(folder):
        shown = f"{record.stage}-{record.fingerprint}"
    return re.sub(r"[^\w.@-]+", "--", shown)


def identity(policy: str) -> str:
    """The policy's identity: an artifact's fingerprint, a digest of its folder, or its hub id.

    Of a file above a megabyte the digest covers evenly spaced samples, since training changes
    weights everywhere. Raises PolicyError when it is neither a folder with a model nor a hub id.
    """
    folder = _folder(policy)
    if folder is None:
        return policy
    if record := artifact(folder):
        return record.fingerprint
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _READ_WHOLE:
                digest.update(file.read())
                continue
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def local(policy: str | Path, backend: str = "") -> Path:
    """The policy's folder. A model of the hub is downloaded, unless the cache holds it.

    For a backend that loads no model in this process the name is returned unchanged. Raises
    PolicyError when the policy is not there or cannot be downloaded.
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


def artifact(folder: Path) -> manifest.Manifest | None:
    """The manifest of a policy that is an artifact; None for any other."""
    return manifest.read(folder) if (folder / manifest.FILE).is_file() else None


def recipe(folder: Path) -> dict[str, Any]:
    """The recipe.json that a policy was trained with; empty for one that is no artifact."""
    path = folder / "recipe.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def special_tokens(policy: Path) -> set[str]:
    """The special tokens in the files of a policy's tokenizer; empty where its folder is not here."""
    tokens: list[dict[str, Any]] = []
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (policy / file).is_file():
            values = json.loads((policy / file).read_text(encoding="utf-8"))
            tokens += values.get("added_tokens") or []
            tokens += (values.get("added_tokens_decoder") or {}).values()
    return {token["content"] for token in tokens if token.get("special")}


def check_words(tokens: Iterable[str], card: Card) -> None:
    """Refuse a card whose words hold one of a policy's special `tokens`, or a tag of the answer format.

    A tokenizer would read it as the mark itself: as the end of a turn, or as one more image.
    """
    marks = sorted({token for token in tokens if token.strip()} | set(prompts.TAGS))
    for what, word in [
        ("noun", card.noun),
        ("kind", card.kind),
        *(("class", c) for c in card.classes),
    ]:
        if mark := next((mark for mark in marks if mark in word), None):
            raise StageError(
                f"data card {card.name}: {what} {word!r} holds {mark}, which the policy does not read as "
                "text; write it otherwise in the card"
            )


def note(folder: Path) -> str:
    """What people should know of a policy: `note` in the front matter of its model card, else ""."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    import yaml

    with suppress(ValueError, yaml.YAMLError, AttributeError, IndexError):
        front = yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])
        return " ".join(str(front.get("note") or "").split())
    return ""


def _folder(policy: str) -> Path | None:
    """The model's folder, or None for a hub id. Raises PolicyError when it is neither."""
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
