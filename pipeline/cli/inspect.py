"""Describe an artifact: its counts, its tables and some of their rows, as values or as a page."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import store
from pipeline.cli import status
from pipeline.cli.where import Condition, ConditionError, NoColumn
from tasks.pages import render
from tasks.pages.gallery import data_uri
from tasks.runtime.errors import ShardError
from tasks.tables import shards
from tasks.tables.manifest import Manifest

SHORT = 400  # characters of a value that a page shows
BATCH_ROWS = 256  # rows in memory at a time, with all their columns


def tables(folder: Path, rows: int, where: str = "") -> list[dict[str, Any]]:
    """The tables of an artifact, each with the keys table, rows, fit, columns and first.

    `fit` is how many rows fit the condition `where`, and `first` the first `rows` of those. Tables
    that lack a column of the condition are left out. Raises ConditionError when all tables lack
    one, or when the condition does not suit the columns' types.
    """
    manifest = store.manifest_of(folder)
    condition = Condition(where) if where else None
    shown: list[dict[str, Any]] = []
    known: set[str] = set()
    missing: list[str] = []
    for name, count in manifest.rows.items():
        paths = shards.paths(folder, name)
        schema = pq.read_schema(paths[0])
        known |= set(schema.names)
        if condition is None:
            fit, first = count, _first_rows(paths, rows)
        else:
            try:
                condition.check(schema)
            except NoColumn as error:
                missing.append(error.name)
                continue
            fit, first = _fitting_rows(paths, condition, rows)
        kinds = {field.name: str(field.type) for field in schema}
        shown.append({"table": name, "rows": count, "fit": fit, "columns": kinds, "first": first})
    if condition and not shown:
        for name in missing:
            if name.lower() not in {column.lower() for column in known}:
                raise ConditionError(condition.unknown(name, sorted(known)))
        raise ConditionError(f"--where: no table has all of {', '.join(condition.columns)}")
    return shown


def _first_rows(paths: list[Path], rows: int) -> list[dict[str, Any]]:
    first: list[dict[str, Any]] = []
    for path in paths:
        if len(first) < rows:
            batches = shards.iter_batches(path, None, min(rows, BATCH_ROWS))
            first += itertools.islice(
                (row for b in batches for row in b.to_pylist()), rows - len(first)
            )
    return first


def _fitting_rows(
    paths: list[Path], condition: Condition, rows: int
) -> tuple[int, list[dict[str, Any]]]:
    """How many rows fit the condition, and the first `rows` of them."""
    fit = 0
    first: list[dict[str, Any]] = []
    for path in paths:
        numbers = condition.rows(path)
        fit += len(numbers)
        first += _rows_at(path, numbers[: rows - len(first)].tolist())
    return fit, first


def _rows_at(path: Path, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """The rows with these numbers; only the row groups that hold them are read."""
    if not numbers:
        return
    metadata = pq.read_metadata(path)
    start = 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if any(start <= number < stop for number in numbers):
            for batch in shards.iter_batches(path, None, BATCH_ROWS, [group]):
                here = [n - start for n in numbers if start <= n < start + batch.num_rows]
                yield from batch.take(pa.array(here, pa.int64())).to_pylist()
                start += batch.num_rows
        start = stop


def plain(value: Any) -> Any:
    """A value for JSON or a terminal. An image or bytes are replaced by their size."""
    if isinstance(value, dict) and "bytes" in value:
        return f"<image, {len(value['bytes'] or b'')} bytes>"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def described(folder: Path, rows: int, where: str = "") -> dict[str, Any]:
    """An artifact as JSON values: its manifest without the checksums, and its tables."""
    manifest = store.manifest_of(folder)
    keys = (
        "stage",
        "fingerprint",
        "settings",
        "rows",
        "stats",
        "seconds",
        "peak_memory_mb",
        "created",
    )
    shown = [
        {**table, "first": [plain(row) for row in table["first"]]}
        for table in tables(folder, rows, where)
    ]
    return {"folder": str(folder), **{key: getattr(manifest, key) for key in keys}, "tables": shown}


def page(folder: Path, rows: int, where: str = "") -> str:
    """The artifact as an HTML page that opens offline: counts and rows, images as thumbnails.

    A table without an image column shows the images of its image ids, where they can be found.
    """
    manifest = store.manifest_of(folder)
    images = _image_store(folder, manifest)
    title = f"{manifest.stage} {manifest.fingerprint}"
    facts = {
        "rows": manifest.rows,
        "seconds": manifest.seconds,
        "created": manifest.created,
        **manifest.stats,
    }
    return render(
        "rows.html.jinja",
        title=title,
        facts=[(name, _text(value)) for name, value in facts.items()],
        tables=[_values(table, images) for table in tables(folder, rows, where)],
        where=where,
    )


def _values(table: dict[str, Any], images: shards.ImageStore | None) -> dict[str, Any]:
    """The template's values for a table. A cell is a text, or a picture ("" where it is missing)."""
    rows = table["first"]
    names = list(table["columns"])
    pictures = _pictures(rows, images) if "image" not in names and "image_id" in names else {}
    cells = [[_cell(row[name]) for name in names] for row in rows]
    if pictures:
        for row, shown in zip(rows, cells, strict=True):
            shown.insert(0, {"picture": data_uri(pictures.get(row["image_id"]))})
    return {
        "name": table["table"],
        "total": table["rows"],
        "fit": table["fit"],
        "columns": [*(["image"] if pictures else []), *names],
        "rows": cells,
    }


def _cell(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and "bytes" in value:
        return {"picture": data_uri(value["bytes"])}
    text = _text(value)
    return {"picture": None, "text": text if len(text) <= SHORT else f"{text[:SHORT]} …"}


def _text(value: Any) -> str:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _pictures(rows: list[dict], images: shards.ImageStore | None) -> dict[str, bytes]:
    ids = sorted({row["image_id"] for row in rows})
    try:
        return images.read(ids) if images and ids else {}
    except ShardError:
        return {}


def _image_store(folder: Path, manifest: Manifest) -> shards.ImageStore | None:
    """The images that an artifact was made from, if they lie below the same artifact root."""
    wanted = manifest.inputs.get("download")
    resolved = folder.resolve()
    above = resolved.parents[: min(5, len(resolved.parents))]
    root = next((p for p in reversed(above) if (p / "download").is_dir()), None)
    folders = [f for f in status.artifacts(root) if f.name == wanted] if root and wanted else []
    return shards.ImageStore(folders[0]) if folders else None
