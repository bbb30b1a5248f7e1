"""Whether artifacts are what they were when they were made, and fit one another.

Bytes are compared with the sha256 in the manifest, and the manifest with its own; then every table's
columns are compared with this version's, its rows counted, and its ids looked up in the artifacts
it was made from, page checksums verified.
"""

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.artifacts import store
from pipeline.cli.status import artifacts
from tasks.tables import schemas, shards

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MEND = "delete the folder, and a run makes it again: python -m pipeline invalidate"


def problems(folder: Path, others: dict[str, Path]) -> Iterator[str]:
    """Each thing that is wrong with an artifact; `others` are all artifacts by fingerprint."""
    path = folder / store.MANIFEST
    try:
        manifest = store.read_manifest(folder)
        broken = store.seal_is_broken(path.read_bytes())
    except (store.StageFailed, OSError, ValueError) as error:
        yield f"{path}: {error}; {MEND}"
        return
    if broken:
        yield f"{path} is not what was written (its own digest differs); {MEND}"
        return
    damaged = False
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    for name in sorted(there - manifest["files"].keys() - {store.MANIFEST}):
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
        elif "rows" in facts and (strange := columns_apart(path, manifest["stage"])):
            damaged = True
            yield f"{path} was written by another version: {strange}; {MEND}"
    if not damaged:
        yield from _references(folder, manifest, others)


SCHEMAS: dict[str, Callable[..., Any]] = {
    "images": schemas.images,
    "rejects": schemas.rejects,
    "split": schemas.split,
    "duplicates": schemas.duplicates,
    "rollouts": schemas.rollouts,
    "candidates": schemas.candidates,
    "mcq": schemas.mcq,
    "predictions": schemas.predictions,
    "train_log": schemas.train_log,
    "completions": schemas.completions,
    "retired": schemas.refused,
    "verdicts": schemas.verdicts,
    "judgements": schemas.judgements,
}
REFUSED = "_refused"  # ends the name of the images that an engine would not take, of any table


def schema_of(table: str, stage: str) -> Callable[..., Any] | None:
    """The schema of a stage's table: Evaluate names raw answers by mode, as others name questions."""
    if table.endswith(REFUSED):
        return schemas.refused
    if stage == "Evaluate" and table != "predictions":
        return schemas.rollouts
    return SCHEMAS.get(table)


def columns_apart(path: Path, stage: str) -> str:
    """In what a table differs from the schema that this version writes and reads; "" in nothing."""
    schema = schema_of(path.stem.rstrip("0123456789").rstrip("-"), stage)
    if schema is None:
        return ""
    there = {field.name: field.type for field in pq.read_schema(path)}
    rewards = [name.removeprefix("reward/") for name in there if name.startswith("reward/")]
    given = {"names": ["a class"], "rewards": rewards}
    wanted = schema(**{name: given[name] for name in signature(schema).parameters})
    wanted = {field.name: field.type for field in wanted}
    if there == wanted:
        return ""
    told = [f"no column {name}" for name in wanted.keys() - there.keys()]
    told += [f"an unknown column {name}" for name in there.keys() - wanted.keys()]
    shared = wanted.keys() & there.keys()
    told += [f"{n} is {there[n]}, not {wanted[n]}" for n in shared if there[n] != wanted[n]]
    return ", ".join(sorted(told)) or "its columns stand in another order"


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
    others = {folder.name: folder for folder in artifacts(root)}
    return [problem for folder in chosen for problem in problems(folder, others)]
