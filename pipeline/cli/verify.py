"""Check artifacts: checksums, schemas, row counts, and the ids that one artifact takes from another.

Every file is compared with its sha256 in the manifest, and the manifest with its own. Every table's
columns are compared with this version's schema, its rows are counted, and its image ids are looked
up in the artifacts it was made from. Page checksums are verified while reading. A quick check compares
the manifest with its own sha256, and the names and sizes of the files with it; it reads no file.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from pipeline.artifacts import store
from pipeline.cli.status import artifacts
from tasks.language.prompts import LETTERS
from tasks.tables.durable import sha256_file
from tasks.tables.manifest import File, Manifest

MEND = "delete the folder, and a run makes it again: python -m pipeline invalidate"


def problems(folder: Path, others: dict[str, Path], quick: bool = False) -> Iterator[str]:
    """Each problem of an artifact, in one sentence; `others` are all artifacts by fingerprint."""
    path = folder / store.MANIFEST
    try:
        manifest = store.manifest_of(folder)
        broken = store.seal_is_broken(path.read_bytes())
    except (store.StageFailed, OSError, ValueError) as error:
        yield f"{path}: {error}; {MEND}"
        return
    if broken:
        yield f"{path} is not what was written (its own digest differs); {MEND}"
        return
    damaged = False
    sizes = _sizes(folder)
    for name in sorted(sizes.keys() - manifest.files.keys() - {store.MANIFEST}):
        yield f"{folder / name} is not in the manifest; remove it"
    for name, file in manifest.files.items():
        if name not in sizes:
            damaged = True
            yield f"{folder / name} is missing; {MEND}"
        elif sizes[name] != file.bytes:
            damaged = True
            yield (
                f"{folder / name} is not what was written ({sizes[name]:,} bytes, not "
                f"{file.bytes:,}); {MEND}"
            )
        elif not quick and (problem := _unlike(folder / name, file, manifest.stage)):
            damaged = True
            yield problem
    if not damaged and not quick:
        yield from _references(folder, manifest, others)


def _sizes(folder: Path) -> dict[str, int]:
    """Path below the folder -> size in bytes, of every file."""
    sizes = {}
    for place, _, names in os.walk(folder):
        below = Path(place).relative_to(folder).as_posix()
        for name in names:
            with suppress(FileNotFoundError):  # a link to nothing
                size = os.stat(f"{place}/{name}").st_size
                sizes[name if below == "." else f"{below}/{name}"] = size
    return sizes


def _unlike(path: Path, file: File, stage: str) -> str:
    """How a file's content differs from what its manifest and this version's schema say, or ""."""
    import pyarrow.parquet as pq  # slow to import, and a quick check does without

    if sha256_file(path) != file.sha256:
        return f"{path} is not what was written (sha256 differs); {MEND}"
    if file.rows is None:
        return ""
    if pq.read_metadata(path).num_rows != file.rows:
        return f"{path} has other than {file.rows} rows"
    strange = columns_apart(path, stage)
    return f"{path} was written by another version: {strange}; {MEND}" if strange else ""


# The tables of all stages, by the name of their schema where it is another.
SCHEMAS = {
    "images": "",
    "rejects": "",
    "split": "",
    "duplicates": "",
    "rollouts": "",
    "candidates": "",
    "mcq": "",
    "predictions": "",
    "train_log": "",
    "completions": "",
    "retired": "refused",
    "verdicts": "",
    "judgements": "",
}
REFUSED = "_refused"  # suffix of any table that lists the images which an engine refused


def schema_of(table: str, stage: str) -> Callable[..., Any] | None:
    """The schema of a stage's table; None for an unknown one. Evaluate names rollouts by mode."""
    from tasks.tables import schemas  # slow to import, and a quick check does without

    if table.endswith(REFUSED):
        return schemas.refused
    if stage == "Evaluate" and table != "predictions":
        return schemas.rollouts
    return getattr(schemas, SCHEMAS[table] or table) if table in SCHEMAS else None


def columns_apart(path: Path, stage: str) -> str:
    """How a table's columns differ from this version's schema; "" where they are equal."""
    import pyarrow.parquet as pq

    schema = schema_of(path.stem.rstrip("0123456789").rstrip("-"), stage)
    if schema is None:
        return ""
    present = {field.name: field.type for field in pq.read_schema(path)}
    rewards = [name.removeprefix("reward/") for name in present if name.startswith("reward/")]
    examples = {"names": ["a class"], "rewards": rewards}
    wanted = schema(**{name: examples[name] for name in signature(schema).parameters})
    wanted = {field.name: field.type for field in wanted}
    if present == wanted:
        return ""
    differences = [f"no column {name}" for name in wanted.keys() - present.keys()]
    differences += [f"an unknown column {name}" for name in present.keys() - wanted.keys()]
    differences += [
        f"{name} is {present[name]}, not {wanted[name]}"
        for name in wanted.keys() & present.keys()
        if present[name] != wanted[name]
    ]
    return ", ".join(sorted(differences)) or "its columns stand in another order"


def _references(folder: Path, manifest: Manifest, others: dict[str, Path]) -> Iterator[str]:
    """Image ids that the inputs do not hold, and letters that are not the truth's."""
    inputs = {key.split("/")[0]: others.get(value) for key, value in manifest.inputs.items()}
    lost = [key for key, value in manifest.inputs.items() if value not in others]
    if lost:  # gc may have deleted them; the artifact itself is sound
        return
    tables = set(manifest.rows)
    if manifest.stage == "Split":
        yield from _unknown(folder, "split", inputs["download"], "images")
    if "rollouts" in tables and inputs.get("split"):
        yield from _unknown(folder, "rollouts", inputs["split"], "split")
    if "predictions" in tables and inputs.get("split"):
        yield from _unknown(folder, "predictions", inputs["split"], "split")
    split = inputs.get("split")
    if manifest.stage == "BuildMCQ" and "mcq" in tables and split:
        strange = list(_unknown(folder, "mcq", split, "split"))
        yield from strange or _letters(folder, split, manifest)


def _unknown(folder: Path, table: str, other: Path | None, name: str) -> Iterator[str]:
    """A problem if `table` has image ids that the table `name` of the artifact `other` has not."""
    if other is None:
        return
    from tasks.tables import shards

    known = set(shards.read(other, name, ["image_id"])["image_id"].to_pylist())
    ids = set(shards.read(folder, table, ["image_id"])["image_id"].unique().to_pylist())
    if strange := sorted(ids - known):
        yield f"{folder}: {table} has {len(strange)} images that {other} has not, {strange[0]} first"


def _letters(folder: Path, split: Path, manifest: Manifest) -> Iterator[str]:
    """A problem if an answer letter is not that of the image's class, where labels are the truth.

    A question for training without labels has neither an answer nor an option.
    """
    if manifest.settings.get("answer_from", "label") != "label":
        return
    from tasks.tables import shards

    labels = dict(
        zip(*shards.read(split, "split", ["image_id", "label"]).to_pydict().values(), strict=True)
    )
    columns = ["mcq_id", "image_id", "option_class_ids", "answer_letter"]
    unlabelled = "unlabelled_groups" in manifest.settings
    for row in shards.read(folder, "mcq", columns).to_pylist():
        if unlabelled:
            if row["answer_letter"] or row["option_class_ids"]:
                yield f"{folder}: question {row['mcq_id']} tells a label, in training without labels"
                return
            continue
        index = LETTERS.index(row["answer_letter"])
        if row["option_class_ids"][index : index + 1] != [labels.get(row["image_id"])]:
            yield f"{folder}: the answer of question {row['mcq_id']} is not its image's class"
            return


def check(root: Path, folders: list[Path], quick: bool = False) -> list[str]:
    """The problems of some artifacts below `root`."""
    others = {folder.name: folder for folder in artifacts(root)}
    return [problem for folder in folders for problem in problems(folder, others, quick)]
