"""Opens a card's image source: drawn images, a folder, a table, official archives, or the hub.

Each kind becomes a Source: the number of images, where it is known, and an iterator from any index
on. The list of a million images takes about ten megabytes.
"""

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_cards import Card, beetles, clean_name
from tasks.ingest import archives as archive_files
from tasks.ingest import folders, hub, layouts
from tasks.ingest.duplicates import repeated
from tasks.ingest.pictures import Reject
from tasks.ingest.source import Item, Source
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError, first_line

ROWS = 1 << 14  # rows of a list that are Python objects at a time
PACKING = pa.ipc.IpcWriteOptions(compression="zstd")
LISTED = pa.schema([("path", pa.string()), ("label", pa.int32()), ("split", pa.string())])


def open_source(card: Card, archives: Path, workplace: Path, mirror: bool = False) -> Source:
    """The card's source, checked as far as possible before an image is read.

    Official archives lie in `archives` and are unpacked to `workplace`; with `mirror` the card's
    copy on the hub is read instead. Raises StageError when the source is missing, names a class that
    the card does not have, or has no image of one of the card's classes.
    """
    kind = card.source["kind"]
    if mirror and kind == "archive" and "mirror" not in card.source:
        raise StageError(f"card {card.name} names no mirror; set [Download] mirror = false")
    if kind == "hub" or (mirror and kind == "archive"):
        return hub.open_source(card, card.source if kind == "hub" else card.source["mirror"])
    if kind == "archive":
        return _archive(card, archives, workplace)
    return {"drawn": _drawn, "folder": _folder}[kind](card)


def listing(
    card: Card,
    entries: Iterable[tuple[str, int, str]],
    load: Callable[[str, int], bytes],
    crop_bottom: int = 0,
    named_once: Path | None = None,
) -> Source:
    """A source from a list of (path, label, split), which is kept compressed in memory.

    `load` returns an image's bytes for its path and label. `named_once` names the table whose paths
    must be unique.
    """
    rest = iter(entries)
    kept: list[pa.Buffer] = []
    labels: set[int] = set()
    total = 0
    for part in iter(lambda: list(islice(rest, ROWS)), []):
        columns = [
            pa.array(column, field.type)
            for column, field in zip(zip(*part, strict=True), LISTED, strict=True)
        ]
        kept.append(_packed(pa.RecordBatch.from_arrays(columns, schema=LISTED)))
        labels.update(columns[1].unique().to_pylist())
        total += len(part)

    def rows(start: int = 0) -> Iterator[dict[str, Any]]:
        for index in range(start // ROWS, len(kept)):
            yield from _unpacked(kept[index]).slice(max(0, start - index * ROWS)).to_pylist()

    def items(start: int) -> Iterator[Item]:
        for path, label, split in map(dict.values, rows(start)):
            yield Item(path, label, split, partial(load, path, label), crop_bottom)

    def digest(start: int, stop: int) -> str:
        text = json.dumps(list(islice(rows(start), stop - start)))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    if named_once:
        _require_once(lambda: (row["path"] for row in rows()), total, named_once)
    require_every_class(card, labels, "image")
    return Source(total, items, digest=digest)


def _packed(batch: pa.RecordBatch) -> pa.Buffer:
    """A batch as compressed bytes. Paths are repetitive and shrink to a tenth."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=PACKING) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _unpacked(packed: pa.Buffer) -> pa.RecordBatch:
    with pa.ipc.open_stream(packed) as stream:
        return stream.read_next_batch()


def require_every_class(card: Card, labels: Iterable[int], what: str) -> None:
    """Raise StageError when `labels` lack a class of the card; `what` names the thing in the message."""
    present = set(labels)
    if empty := [name for label, name in enumerate(card.classes) if label not in present]:
        raise StageError(
            f"card {card.name}: no {what} of {len(empty)} of {len(card.classes)} classes "
            f"({', '.join(empty[:5])}); correct `classes` or `source` in the card"
        )


def _drawn(card: Card) -> Source:
    seed, per_class = card.source["seed"], card.source["images_per_class"]

    def draw(path: str, label: int) -> bytes:
        split, _, index = path.split("/")
        buffer = io.BytesIO()
        beetles.draw(label, int(index.removesuffix(".png")), seed, split).save(buffer, "PNG")
        return buffer.getvalue()

    entries = (
        (f"{split}/{name}/{index:04d}.png", label, split)
        for split, count in per_class.items()
        for label, name in enumerate(card.classes)
        for index in range(count)
    )
    return listing(card, entries, draw)


def _archive(card: Card, archives: Path, workplace: Path) -> Source:
    """The images of official archives, unpacked into `workplace`."""
    files = archive_files.fetch(card.source["files"], archives, card.name)
    root = archive_files.unpacked(files, workplace, report=lambda text: print(f"download: {text}"))
    entries = layouts.entries(card.source["layout"], root, card.classes)
    return listing(card, entries, reader(root), int(card.source.get("crop_bottom", 0)))


def _table(card: Card, table: Path) -> Source:
    """The images that a CSV or Parquet file lists, with the columns path, class and optionally split."""
    known = ClassNames(card.classes, card.aliases)

    def entries() -> Iterator[tuple[str, int, str]]:
        number = 0
        for rows in _rows(table):
            for path, name, part in rows:
                number += 1
                for column, cell in (("path", path), ("class", name)):
                    if not cell.strip():
                        raise StageError(f"{table}, row {number}: the cell of {column!r} is empty")
                class_id = known.match(name).class_id
                if class_id is None:
                    raise StageError(
                        f"{table}, row {number}: no class {name!r} in card {card.name}"
                    )
                split = folders.split_named(part) if part.strip() else ""
                if split is None:
                    allowed = ", ".join(folders.SPLITS)
                    raise StageError(f"{table}, row {number}: split {part!r} is none of {allowed}")
                yield path, class_id, split

    return listing(card, entries(), reader(table.parent), named_once=table)


def _rows(table: Path) -> Iterator[Iterable[tuple[str, str, str]]]:
    """About ROWS rows of a table at a time: path, class, split. An empty cell is "".

    Cells stay as they are written: 007 is no number, and NA or null may be the name of a class.
    """
    try:
        if table.suffix.lower() == ".csv":
            with table.open(encoding="utf-8-sig", newline="") as file:
                lines = filter(None, csv.reader(file, strict=True))  # blank lines are none
                header = [name.strip() for name in next(lines, [])]
                places = [header.index(name) for name in _wanted(table, header)]
                yield from iter(lambda: list(_cells(table, lines, places, len(header))), [])
        else:
            with pq.ParquetFile(table) as file:
                wanted = _wanted(table, file.schema_arrow.names)
                for batch in file.iter_batches(ROWS, columns=wanted):
                    texts = [batch[n].cast(pa.string()).fill_null("").to_pylist() for n in wanted]
                    yield zip(*texts, *[[""] * batch.num_rows] * (3 - len(texts)), strict=True)
    except StageError:
        raise
    except UnicodeDecodeError as error:
        raise StageError(f"{table} is not UTF-8; save it as UTF-8 ({error.reason})") from error
    except (OSError, csv.Error, pa.ArrowException) as error:
        raise StageError(f"{table} cannot be read: {first_line(error)}") from error


def _cells(
    table: Path, lines: Iterator[list[str]], places: list[int], width: int
) -> Iterator[tuple[str, str, str]]:
    """The next ROWS lines of a CSV file: the cells at `places`, "" where a line ends early."""
    for cells in islice(lines, ROWS):
        if any(cell.strip() for cell in cells[width:]):
            raise StageError(
                f"{table}: {cells[places[0]]!r} has more cells than the header; put a text with "
                "commas between quotation marks"
            )
        padded = [*cells, *[""] * width]
        path, name, *split = (padded[place] for place in places)
        yield path, name, split[0] if split else ""


def _wanted(table: Path, columns: list[str]) -> list[str]:
    """The columns that are read. Raises StageError when one is missing."""
    if missing := [column for column in ("path", "class") if column not in columns]:
        raise StageError(
            f"{table} has no column {missing[0]!r}; it has {', '.join(map(str, columns))}"
        )
    return [column for column in ("path", "class", "split") if column in columns]


def _require_once(paths: Callable[[], Iterator[str]], count: int, table: Path) -> None:
    """Raise StageError when a path comes twice. Only paths whose 64-bit hash repeats are compared."""
    hashes = (xxhash.xxh3_64_intdigest(path.encode()) for path in paths())
    keys = np.fromiter(hashes, np.uint64, count)
    doubtful = set(repeated(keys, among=np.ones(count, bool)).tolist())
    seen = set()
    for row, path in enumerate(paths() if doubtful else ()):
        if row in doubtful and path in seen:
            raise StageError(f"{table}, row {row + 1}: {path} comes twice")
        if row in doubtful:
            seen.add(path)


def reader(root: Path) -> Callable[[str, int], bytes]:
    """A function that loads a file below `root`, and raises Reject where it cannot be read."""

    def load(path: str, label: int) -> bytes:
        try:
            return (root / path).read_bytes()
        except FileNotFoundError as error:
            raise Reject(folders.why_missing(root / path)) from error
        except OSError as error:
            raise Reject(f"cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # a path with a null byte, or with half a character
            raise Reject(f"cannot be read: {first_line(error)}") from error

    return load


def _folder(card: Card) -> Source:
    """A folder with `class_name/file`, or the same below `train/` and `test/`, or a table of paths."""
    root = Path(os.path.expanduser(str(card.source.get("path", ""))))
    if root.suffix.lower() in (".csv", ".parquet") and root.is_file():
        return _table(card, root)
    if not root.is_dir():
        raise StageError(f"card {card.name}: source.path {root} is not a folder")
    known = ClassNames(card.classes, card.aliases)
    mapped = {_composed(str(k)): v for k, v in (card.source.get("folders") or {}).items()}

    tops = folders.class_folders(root)
    left_out = folders.outside(root, tops)

    def entries() -> Iterator[tuple[str, int, str]]:
        for split, folder in tops:
            name = mapped.get(_composed(folder.name), folder.name)
            label = known.match(clean_name(str(name))).class_id
            if label is None:
                raise StageError(
                    f"{folder}: no class {folder.name!r} in card {card.name}; add it to `classes`, "
                    f"or map it under source.folders"
                )
            for path in folders.photographs(root, folder, left_out):
                yield folders.relative(path, root), label, split

    return replace(listing(card, entries(), reader(root)), left_out=left_out)


def _composed(text: str) -> str:
    """Text in NFC: some file systems store accented letters decomposed."""
    return unicodedata.normalize("NFC", text)
