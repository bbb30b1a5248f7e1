"""Writes and reads Parquet shards: checked against a schema, with page checksums, atomically.

A shard gets its file name only once its bytes are on disk. So a shard that exists is complete, and a
killed stage resumes after the last one. Page checksums are written and verified, because without
them most single-bit flips would read back as silently wrong values.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.runtime.errors import ShardError
from tasks.tables.durable import sha256_file as sha256_file  # also used as `shards.sha256_file`
from tasks.tables.durable import sync
from tasks.tables.durable import sync_tree as sync_tree
from tasks.tables.durable import write_text as write_text

T = TypeVar("T")
IMAGE_ROWS_PER_GROUP = 100  # a row group of photographs then has about 10 MB
BYTES_PER_GROUP = 64 << 20  # a row group of large photographs ends here
ROWS_PER_GROUP = 1 << 20


def shard_path(folder: Path, name: str, index: int) -> Path:
    """`folder/name-00042.parquet`."""
    return folder / f"{name}-{index:05d}.parquet"


class Writer:
    """Writes one Parquet file row by row, in a `with` statement.

    The file gets its name when the statement ends well. After an error, or without rows, there is no
    file: `datasets` cannot load a Parquet file without rows, and one such shard would spoil a whole
    table. Raises ShardError when rows do not fit the schema.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema = path, schema
        self.partial = path.with_suffix(".tmp")
        self.photographs = "image" in schema.names
        self.rows_per_group = IMAGE_ROWS_PER_GROUP if self.photographs else ROWS_PER_GROUP
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0
        self.file: Any = None
        self.parquet: Any = None

    def __enter__(self) -> "Writer":
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Add one row. A row group is written as soon as it is full."""
        self.rows.append(row)
        self.bytes += len(row["image"]["bytes"]) if self.photographs else 0
        if len(self.rows) == self.rows_per_group or self.bytes >= BYTES_PER_GROUP:
            self._write_rows()

    def add_table(self, rows: pa.Table | Sequence[dict[str, Any]]) -> None:
        """Add many rows at once."""
        try:
            if not isinstance(rows, pa.Table):
                rows = pa.Table.from_pylist(list(rows), self.schema)
            table = rows.select(self.schema.names).cast(self.schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
            raise ShardError(f"rows for {self.path.name} do not fit its schema: {error}") from error
        if table.num_rows == 0:
            return
        if self.parquet is None:
            self.file = self.partial.open("wb")
            self.parquet = pq.ParquetWriter(
                self.file,
                self.schema,
                # Photographs are compressed already.
                compression={
                    name: "none" if name == "image.bytes" else "zstd"
                    for field in self.schema
                    for name in _columns(field.name, field.type)
                },
                write_page_checksum=True,
                write_page_index=True,
            )
        self.parquet.write_table(
            table.replace_schema_metadata(self.schema.metadata), self.rows_per_group
        )

    def _write_rows(self) -> None:
        rows, self.rows, self.bytes = self.rows, [], 0
        self.add_table(rows)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._write_rows()
        except BaseException:
            kind = True
            raise
        finally:
            if self.parquet is not None:
                try:
                    self.parquet.close()
                    self.file.flush()
                    os.fsync(self.file.fileno())
                    self.file.close()
                except BaseException:  # a full disk: the file is incomplete
                    self._discard()
                    raise
            if self.parquet is not None and kind is None:
                os.replace(self.partial, self.path)
                sync(self.path.parent)
            else:
                self._discard()

    def _discard(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # flushing its buffer may fail on a full disk
                self.file.close()
        self.partial.unlink(missing_ok=True)


def write(path: Path, rows: pa.Table | Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file; without rows, no file. Raises ShardError like Writer."""
    with Writer(path, schema) as writer:
        writer.add_table(rows)


def _columns(name: str, kind: pa.DataType) -> list[str]:
    """The Parquet columns of a field: a struct has one for each of its fields."""
    if pa.types.is_struct(kind):
        return [
            c
            for i in range(kind.num_fields)
            for c in _columns(f"{name}.{kind[i].name}", kind[i].type)
        ]
    return [f"{name}.list.element"] if pa.types.is_list(kind) else [name]


def paths(folder: Path, name: str) -> list[Path]:
    """The files of one table, in order: `name.parquet` or `name-*.parquet`.

    Raises ShardError when there are none.
    """
    single = folder / f"{name}.parquet"
    files = [single] if single.exists() else sorted(folder.glob(f"{name}-[0-9]*.parquet"))
    if not files:
        raise ShardError(f"{folder} holds no {name} shards; re-run the stage that writes them")
    return files


def read(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All shards of one table as one Arrow table, page checksums verified."""
    tables = [read_file(path, columns) for path in paths(folder, name)]
    return pa.concat_tables(tables)


def iter_rows(
    folder: Path, name: str, columns: Sequence[str] | None = None, batch_size: int = 256
) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, one batch in memory at a time."""
    for path in paths(folder, name):
        for batch in iter_batches(path, columns, batch_size):
            yield from batch.to_pylist()


def count_rows(folder: Path, name: str) -> int:
    """The row count of one table, from the footers of its files."""
    return sum(map(num_rows, paths(folder, name)))


def num_rows(path: Path) -> int:
    """The row count of one shard, from its footer."""
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


def iter_batches(
    path: Path,
    columns: Sequence[str] | None,
    batch_size: int,
    row_groups: Sequence[int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """One shard, or some of its row groups, as record batches, one in memory at a time.

    Page checksums are verified. Raises ShardError for a damaged file.
    """
    try:
        if columns is not None:
            _require(path, columns)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size, row_groups, columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


class ImageStore:
    """The encoded images of a Download artifact by image id. Only the row groups needed are read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._locations: dict[str, tuple[Path, int]] | None = None  # image id -> file, row group

    def read(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        """Encoded bytes by image id. Raises ShardError when an image is missing or damaged."""
        wanted = set(image_ids)
        if lost := sorted(wanted - self.locations.keys()):
            raise ShardError(f"{len(lost)} images are not in {self.folder}, the first: {lost[0]}")
        images: dict[str, bytes] = {}
        by_file: dict[Path, set[int]] = {}
        for image_id in wanted:
            path, group = self.locations[image_id]
            by_file.setdefault(path, set()).add(group)
        for path, groups in by_file.items():
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for group in sorted(groups):
                        table = file.read_row_group(group, ["image_id", "image"])
                        for row in table.to_pylist():
                            if row["image_id"] in wanted:
                                images[row["image_id"]] = row["image"]["bytes"]
            except (OSError, pa.ArrowInvalid) as error:
                raise _damaged(path, error) from error
        return images

    @property
    def locations(self) -> dict[str, tuple[Path, int]]:
        """Image id -> (file, row group), read once from the id columns alone."""
        if self._locations is None:
            self._locations = {}
            for path in paths(self.folder, "images"):
                try:
                    with pq.ParquetFile(path, page_checksum_verification=True) as file:
                        for group in range(file.num_row_groups):
                            ids = file.read_row_group(group, ["image_id"])["image_id"].to_pylist()
                            self._locations |= dict.fromkeys(ids, (path, group))
                except (OSError, pa.ArrowInvalid) as error:
                    raise _damaged(path, error) from error
        return self._locations


def chunks(items: list[T], size: int) -> Iterable[list[T]]:
    """Consecutive slices of at most `size` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def read_file(
    path: Path, columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """One shard as an Arrow table, page checksums verified.

    `where` filters rows, and skips row groups by their statistics. Raises ShardError for a damaged
    file or a missing column.
    """
    try:
        if columns is not None:
            _require(path, columns)
        return pq.read_table(path, columns=columns, filters=where, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


def _require(path: Path, columns: Sequence[str]) -> None:
    """Raise ShardError when the file lacks one of `columns`: another version wrote it."""
    present = pq.read_schema(path).names
    if lost := [name for name in columns if name.split(".")[0] not in present]:
        raise ShardError(
            f"{path} has no column {lost[0]}: it was written by another version; delete its folder "
            "and re-run the stage"
        )


def _damaged(path: Path, error: Exception) -> ShardError:
    return ShardError(
        f"{path} is damaged ({str(error).splitlines()[0]}); delete its folder and re-run the stage"
    )
