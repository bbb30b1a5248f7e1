"""What an artifact holds: its counts, its tables and some of their rows, as values or as a page."""

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

SHORT = 400  # characters of a value on a page
BATCH_ROWS = 256  # in memory at a time, with all their columns


def tables(folder: Path, rows: int, where: str = "") -> list[dict[str, Any]]:
    """Every table of an artifact: its name and columns, how many rows it has, how many of them fit
    the condition `where`, and the first `rows` of those. With a condition, tables without its columns are left out.

    Raises ConditionError for a condition that no table has the columns of, or that does not fit them.
    """
    manifest = store.read_manifest(folder)
    condition = Condition(where) if where else None
    shown: list[dict[str, Any]] = []
    known: set[str] = set()
    missing: list[str] = []
    for name, count in manifest["rows"].items():
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
    found: list[dict[str, Any]] = []
    for path in paths:
        if len(found) < rows:
            batches = shards.iter_batches(path, None, min(rows, BATCH_ROWS))
            found += itertools.islice(
                (row for b in batches for row in b.to_pylist()), rows - len(found)
            )
    return found


def _fitting_rows(
    paths: list[Path], condition: Condition, rows: int
) -> tuple[int, list[dict[str, Any]]]:
    """How many rows fit, and the first of them."""
    fit = 0
    found: list[dict[str, Any]] = []
    for path in paths:
        places = condition.rows(path)
        fit += len(places)
        found += _rows_at(path, places[: rows - len(found)].tolist())
    return fit, found


def _rows_at(path: Path, places: list[int]) -> Iterator[dict[str, Any]]:
    """The rows at these places of a file, of which only the row groups that hold them are read."""
    if not places:
        return
    metadata = pq.read_metadata(path)
    start = 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        if any(start <= place < stop for place in places):
            for batch in shards.iter_batches(path, None, BATCH_ROWS, [group]):
                here = [p - start for p in places if start <= p < start + batch.num_rows]
                yield from batch.take(pa.array(here, pa.int64())).to_pylist()
                start += batch.num_rows
        start = stop


def plain(value: Any) -> Any:
    """A value for JSON or a terminal; of an image, its size."""
    if isinstance(value, dict) and "bytes" in value:
        return f"<image, {len(value['bytes'] or b'')} bytes>"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def described(folder: Path, rows: int, where: str = "") -> dict[str, Any]:
    """An artifact as plain values: what made it, its counts, its tables."""
    manifest = store.read_manifest(folder)
    kept = (
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
    return {"folder": str(folder), **{k: manifest.get(k) for k in kept}, "tables": shown}


def page(folder: Path, rows: int, where: str = "") -> str:
    """The artifact as a page that opens offline: counts and rows, images as thumbnails.

    Rows of a table without images show those of their image ids, where the images are still there.
    """
    manifest = store.read_manifest(folder)
    images = _image_store(folder, manifest)
    title = f"{manifest['stage']} {manifest['fingerprint']}"
    facts = {"rows": manifest["rows"], "seconds": manifest.get("seconds"), "created": manifest.get("created"), **manifest.get("stats", {})}  # fmt: skip
    return render(
        "rows.html.jinja",
        title=title,
        facts=[(name, _text(value)) for name, value in facts.items()],
        tables=[_values(table, images) for table in tables(folder, rows, where)],
        where=where,
    )


def _values(table: dict[str, Any], images: shards.ImageStore | None) -> dict[str, Any]:
    """What the page shows of a table: a cell is a text, or a picture that may not be there ("")."""
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


def _image_store(folder: Path, manifest: dict[str, Any]) -> shards.ImageStore | None:
    """The images that an artifact was made from, if they are below the same root."""
    wanted = manifest.get("inputs", {}).get("download")
    resolved = folder.resolve()
    above = resolved.parents[: min(5, len(resolved.parents))]
    root = next((p for p in reversed(above) if (p / "download").is_dir()), None)
    found = [f for f in status.artifacts(root) if f.name == wanted] if root and wanted else []
    return shards.ImageStore(found[0]) if found else None
