"""Where a card's images come from: drawn, a folder, a table, official archives, or the hub.

Every source becomes a Source: how many images there are, where that is known, and a way to go
through them from any place on, one at a time. A million images cost some ten megabytes.
"""

import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_cards import Card, beetles, clean_name
from tasks.ingest import archives as archive_files
from tasks.ingest import hub, layouts
from tasks.ingest.duplicates import repeated
from tasks.ingest.pictures import Reject
from tasks.ingest.source import Item, Source
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError, first_line

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
ROWS = 1 << 14  # of a list, in memory as Python objects at a time
PACKING = pa.ipc.IpcWriteOptions(compression="zstd")
LISTED = pa.schema([("path", pa.string()), ("label", pa.int32()), ("split", pa.string())])


def open_source(card: Card, archives: Path, workplace: Path, mirror: bool = False) -> Source:
    """The card's source, with everything checked that can be checked before an image is read.

    `archives` and `workplace` are for official archives: where they lie, where to unpack them;
    with `mirror` the card's copy on the hub is read instead. Raises StageError when the source is
    missing, names classes the card does not have, or has no image of one it does have.
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
    """A source whose images are listed beforehand as (path, label, split), kept packed in memory.

    `load` gives an image's bytes from its path and label. `named_once` is a table of paths, none of
    which may come twice.
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
    """Paths repeat one another: packed they take a tenth of the room."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=PACKING) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _unpacked(packed: pa.Buffer) -> pa.RecordBatch:
    with pa.ipc.open_stream(packed) as stream:
        return stream.read_next_batch()


def require_every_class(card: Card, labels: Iterable[int], what: str) -> None:
    """Raise StageError when a class of the card has no `what` among the `labels`."""
    there = set(labels)
    if empty := [name for label, name in enumerate(card.classes) if label not in there]:
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
    """A CSV or Parquet file with the columns path, class and, optionally, split."""
    known = ClassNames(card.classes, card.aliases)

    def entries() -> Iterator[tuple[str, int, str]]:
        number = 0
        for frame in _frames(table):
            if missing := [column for column in ("path", "class") if column not in frame]:
                raise StageError(
                    f"{table} has no column {missing[0]!r}; it has "
                    f"{', '.join(map(str, frame.columns))}"
                )
            splits = frame["split"].astype(object).fillna("") if "split" in frame else None
            parts = [""] * len(frame) if splits is None else splits
            rows = zip(frame["path"].astype(str), frame["class"].astype(str), parts, strict=True)
            for path, name, part in rows:
                number += 1
                class_id = known.match(name).class_id
                if class_id is None:
                    raise StageError(
                        f"{table}, row {number}: no class {name!r} in card {card.name}"
                    )
                if part and part not in SPLIT_FOLDERS:
                    allowed = ", ".join(SPLIT_FOLDERS)
                    raise StageError(f"{table}, row {number}: split {part!r} is none of {allowed}")
                yield path, class_id, SPLIT_FOLDERS.get(part, "")

    return listing(card, entries(), reader(table.parent), named_once=table)


def _frames(table: Path) -> Iterator[Any]:
    """A table as pandas frames, so many rows of it in memory at a time."""
    import pandas as pd
    import pyarrow.parquet as pq

    try:
        if table.suffix == ".csv":
            with pd.read_csv(table, chunksize=ROWS) as frames:
                yield from frames
        else:
            with pq.ParquetFile(table) as file:
                yield from (batch.to_pandas() for batch in file.iter_batches(ROWS))
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        raise StageError(f"{table} cannot be read: {first_line(error)}") from error


def _require_once(paths: Callable[[], Iterator[str]], count: int, table: Path) -> None:
    """Raise StageError when a path comes twice. Numbers of eight bytes each tell where to look."""
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
    """How the bytes of a file below `root` are had; what cannot be read is a Reject."""

    def load(path: str, label: int) -> bytes:
        try:
            return (root / path).read_bytes()
        except FileNotFoundError as error:
            raise Reject("listed, but there is no such file") from error
        except OSError as error:
            raise Reject(f"cannot be read: {error.strerror or error}") from error

    return load


def _folder(card: Card) -> Source:
    """`class_name/file`, `train/class_name/file` and `test/class_name/file`, or a table of paths."""
    root = Path(os.path.expanduser(str(card.source.get("path", ""))))
    if root.suffix in (".csv", ".parquet") and root.is_file():
        return _table(card, root)
    if not root.is_dir():
        raise StageError(f"card {card.name}: source.path {root} is not a folder")
    known = ClassNames(card.classes, card.aliases)
    mapped = {_composed(str(k)): v for k, v in (card.source.get("folders") or {}).items()}

    def entries() -> Iterator[tuple[str, int, str]]:
        for split, folder in class_folders(root):
            name = mapped.get(_composed(folder.name), folder.name)
            label = known.match(clean_name(str(name))).class_id
            if label is None:
                raise StageError(
                    f"{folder}: no class {folder.name!r} in card {card.name}; add it to `classes`, "
                    f"or map it under source.folders"
                )
            for path in files_below(folder):
                yield path.relative_to(root).as_posix(), label, split

    return listing(card, entries(), reader(root))


def class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, class folder) of a folder of photographs; the split is empty where it is not told.

    Raises StageError for a folder that stands beside train/ and test/.
    """
    tops = _folders(root)
    if not any(path.name in SPLIT_FOLDERS for path in tops):
        return [("", path) for path in tops]
    if stray := [path.name for path in tops if path.name not in SPLIT_FOLDERS]:
        raise StageError(f"{root}: {stray[0]} stands beside train/ and test/; move it away")
    return [(SPLIT_FOLDERS[top.name], path) for top in tops for path in _folders(top)]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth that is not hidden, sorted; links to folders are not followed."""
    with os.scandir(folder) as entries:
        children = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries if e.name[0] != "."]
    for name, is_folder in sorted(children):
        path = folder / name
        if is_folder:
            yield from files_below(path)
        elif path.is_file():
            yield path


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _composed(text: str) -> str:
    """One form of accented letters: some file systems take names apart."""
    return unicodedata.normalize("NFC", text)
