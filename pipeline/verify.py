"""Whether artifacts are what they were when they were made, and fit one another.

Bytes are compared with the sha256 in the manifest; then every table is read with its page checksums
verified, counted, and its ids looked up in the artifacts it was made from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import artifact
from pipeline.status import artifacts
from tasks import shards

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MEND = "delete the folder, and a run makes it again: python -m pipeline invalidate"


def problems(folder: Path, others: dict[str, Path]) -> Iterator[str]:
    """Each thing that is wrong with an artifact; `others` are all artifacts by fingerprint."""
    try:
        manifest = artifact.read_manifest(folder)
    except (OSError, ValueError) as error:
        yield f"{folder}: its manifest cannot be read ({error}); {MEND}"
        return
    damaged = False
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name in sorted(there - manifest["files"].keys() - {artifact.MANIFEST}):
        yield f"{folder / name} is not in the manifest; remove it"
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.exists():
            damaged = True
            yield f"{path} is missing; {MEND}"
        elif shards.sha256_file(path) != facts["sha256"]:
            damaged = True
            yield f"{path} is not what was written (sha256 differs); {MEND}"
        elif "rows" in facts and pq.read_metadata(path).num_rows != facts["rows"]:
            yield f"{path} has other than {facts['rows']} rows"
    if not damaged:
        yield from _references(folder, manifest, others)


def _references(folder: Path, manifest: dict[str, Any], others: dict[str, Path]) -> Iterator[str]:
    """Ids that stand in no input, letters that are not the truth's."""
    inputs = {key.split("/")[0]: others.get(value) for key, value in manifest["inputs"].items()}
    lost = [key for key, value in manifest["inputs"].items() if value not in others]
    if lost:  # gc may have taken them; the artifact itself is sound
        return
    tables = set(manifest["rows"])
    if manifest["stage"] == "Split":
        yield from _unknown(folder, "split", inputs["download"], "images")
    if "rollouts" in tables and inputs.get("split"):
        yield from _unknown(folder, "rollouts", inputs["split"], "split")
    if "predictions" in tables and inputs.get("split"):
        yield from _unknown(folder, "predictions", inputs["split"], "split")
    split = inputs.get("split")
    if manifest["stage"] == "BuildMCQ" and "mcq" in tables and split:
        strange = list(_unknown(folder, "mcq", split, "split"))
        yield from strange or _letters(folder, split, manifest)


def _unknown(folder: Path, table: str, other: Path | None, name: str) -> Iterator[str]:
    if other is None:
        return
    known = set(shards.read(other, name, ["image_id"])["image_id"].to_pylist())
    ids = set(shards.read(folder, table, ["image_id"])["image_id"].unique().to_pylist())
    if strange := sorted(ids - known):
        yield f"{folder}: {table} has {len(strange)} images that {other} has not, {strange[0]} first"


def _letters(folder: Path, split: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Every letter must be that of the image's own class, unless a majority chose the answer."""
    if manifest["settings"].get("answer_from", "label") != "label":
        return
    labels = dict(
        zip(*shards.read(split, "split", ["image_id", "label"]).to_pydict().values(), strict=True)
    )
    columns = ["mcq_id", "image_id", "option_class_ids", "answer_letter"]
    for row in shards.read(folder, "mcq", columns).to_pylist():
        place = LETTERS.index(row["answer_letter"])
        if row["option_class_ids"][place : place + 1] != [labels.get(row["image_id"])]:
            yield f"{folder}: the answer of question {row['mcq_id']} is not its image's class"
            return


def check(root: Path, chosen: list[Path]) -> list[str]:
    """All problems of the chosen artifacts."""
    others = {}
    for folder in artifacts(root):
        others[folder.name] = folder
    return [problem for folder in chosen for problem in problems(folder, others)]
