"""Writes one shard: Parquet files that appear whole, with row groups bounded by rows and bytes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.runtime.errors import ShardError
from tasks.tables.durable import sync

IMAGE_ROWS_PER_GROUP = 100  # a row group of photographs then has about 10 MB
BYTES_PER_GROUP = 64 << 20  # a row group of large photographs ends here
BYTES_PER_FILE = 512 << 20  # of photographs; a shard that holds more is several files
ROWS_PER_GROUP = 1 << 20


def _part(path: Path, number: int) -> Path:
    """File number `number` of a shard: `mcq-00042.parquet`, `mcq-00042_a.parquet`, ..., in this order."""
    if number == 0:
        return path
    letters = "z" * ((number - 1) // 26) + chr(ord("a") + (number - 1) % 26)
    return path.with_stem(f"{path.stem}_{letters}")


def parts(path: Path) -> list[Path]:
    """The files of the shard that is named after its first file."""
    return [path, *sorted(path.parent.glob(f"{path.stem}_[a-z]*.parquet"))]


class Writer:
    """Writes one shard row by row, in a `with` statement: as one Parquet file, or as a few.

    Row groups and files end at a number of bytes as well as of rows, because readers cannot hold
    more than 2 GB of photographs in one column chunk. A shard that needs several files has the
    further ones beside its own (`parts`). The files get their names when the statement ends well,
    the shard's own last. After an error, or without rows, there is no file: `datasets` cannot load a
    Parquet file without rows, and one such shard would spoil a whole table. Raises ShardError when
    rows do not fit the schema.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self.path, self.schema = path, schema
        self.pictures = [name for name in ("image", "images") if name in schema.names]
        self.rows_per_group = IMAGE_ROWS_PER_GROUP if self.pictures else ROWS_PER_GROUP
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0  # of the pictures in `rows`
        self.paths: list[Path] = []  # of the files so far, and of the open one
        self.written = 0  # bytes in the open file
        self.file: Any = None
        self.parquet: Any = None

    def __enter__(self) -> "Writer":
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Add one row. A row group is written as soon as it is full."""
        self.rows.append(row)
        for name in self.pictures:
            shown = row[name] if isinstance(row[name], list) else [row[name]]
            self.bytes += sum(len(picture["bytes"]) for picture in shown if picture)
        if len(self.rows) == self.rows_per_group or self.bytes >= BYTES_PER_GROUP:
            self._write_rows()

    def add_table(self, rows: pa.Table | Sequence[dict[str, Any]]) -> None:
        """Add many rows at once."""
        if self.pictures and not isinstance(rows, pa.Table):
            for row in rows:
                self.add(row)
            return
        try:
            if not isinstance(rows, pa.Table):
                rows = pa.Table.from_pylist(list(rows), self.schema)
            table = rows.select(self.schema.names).cast(self.schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
            raise ShardError(f"rows for {self.path.name} do not fit its schema: {error}") from error
        for part in self._groups(table.replace_schema_metadata(self.schema.metadata)):
            if self.parquet is not None and self.written + part.nbytes > BYTES_PER_FILE:
                self._close()
            if self.parquet is None:
                self._open()
            self.parquet.write_table(part, self.rows_per_group)
            self.written += part.nbytes

    def _groups(self, table: pa.Table) -> Iterator[pa.Table]:
        """The table in slices of a few row groups each; with pictures, of one."""
        start = size = 0
        for row, length in enumerate(self._sizes(table), 1):
            size += length
            if row - start == self.rows_per_group or size >= BYTES_PER_GROUP:
                yield table.slice(start, row - start).combine_chunks()
                start, size = row, 0
        if start < table.num_rows:
            yield table.slice(start).combine_chunks() if self.pictures else table

    def _sizes(self, table: pa.Table) -> list[int]:
        """The bytes of each row's picture; empty for a table of small rows."""
        if "image" not in self.pictures:
            return []
        data = pc.struct_field(table["image"], "bytes")
        return pc.fill_null(pc.binary_length(data), 0).to_pylist()

    def _open(self) -> None:
        self.paths.append(_part(self.path, len(self.paths)))
        self.file, self.written = self.paths[-1].with_suffix(".tmp").open("wb"), 0
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

    def _close(self) -> None:
        self.parquet.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.parquet = None

    def _write_rows(self) -> None:
        rows, self.rows, self.bytes = self.rows, [], 0
        if rows:
            try:
                table = pa.Table.from_pylist(rows, self.schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
                raise ShardError(
                    f"rows for {self.path.name} do not fit its schema: {error}"
                ) from error
            self.add_table(table)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._write_rows()
            if self.parquet is not None:
                self._close()
        except BaseException:  # such as a full disk: the file is incomplete
            self._discard()
            raise
        if kind is not None:
            self._discard()
        for path in reversed(self.paths):
            os.replace(path.with_suffix(".tmp"), path)
            sync(path.parent)

    def _discard(self) -> None:
        if self.parquet is not None:
            with suppress(Exception):  # a full disk may fail here, and in closing the file
                self.parquet.close()
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
        for path in self.paths:
            path.with_suffix(".tmp").unlink(missing_ok=True)
        self.paths = []


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
