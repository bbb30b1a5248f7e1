"""The manifest of an artifact, `manifest.json`: what made it, and the checksum of every file.

Only the pipeline writes it (`pipeline.artifacts.store`), as its last step. Anyone may read it here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from tasks.runtime.errors import StageError

FILE = "manifest.json"
VERSION = 2  # 2: it holds a digest of itself


@dataclass(frozen=True)
class File:
    """One file of an artifact. `rows` is the row count of a Parquet file, None for any other."""

    sha256: str
    bytes: int = 0
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as it was read. A value that it does not record keeps the default given here.

    `inputs` maps an input's name to its artifact's fingerprint, `files` a path below the folder to
    its checksum, `rows` a table to its row count, and `sources` a module's path to its digest.
    """

    stage: str = ""
    fingerprint: str = ""
    code_version: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    card_sha256: str | None = None
    dataset: str = ""
    method: str = ""
    refresh_round: int | None = None
    files: Mapping[str, File] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] | None = None  # None: written before modules were recorded
    source_sha256: str | None = None  # of the stage's own module, where `sources` is None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version
    host: Mapping[str, Any] = field(default_factory=dict)
    created: str | None = None  # UTC, as 2026-01-31T12:00:00Z

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A manifest from its JSON values. Keys that have no field here are left out.

        Raises StageError where the list of files is none.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        try:
            files = {name: File(**facts) for name, facts in known.get("files", {}).items()}
        except (TypeError, AttributeError) as error:
            raise StageError(
                f"the manifest of {known.get('stage', 'an artifact')} is damaged: {error}; delete the "
                "artifact's folder, and a run makes it again"
            ) from error
        return cls(**known | {"files": files})

    @property
    def identity(self) -> dict[str, Any]:
        """What decides whether a run would make this artifact again."""
        return {
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "code_version": self.code_version,
            "card_sha256": self.card_sha256,
        }

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(file.bytes for file in self.files.values())


def read(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`. Raises StageError when it cannot be read."""
    return Manifest.of(read_values(folder / FILE))


def read_values(path: Path) -> dict[str, Any]:
    """The JSON values of the manifest at `path`. Raises StageError when it cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StageError(
            f"{path} cannot be read ({reason}); delete its folder, and a run makes it again"
        ) from error
    if not isinstance(values, dict) or values.get("manifest_version", 1) > VERSION:
        raise StageError(
            f"{path} is of a newer version of this project; update it, or delete the folder"
        )
    return values
