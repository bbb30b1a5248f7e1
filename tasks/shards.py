"""Write and read Parquet shards: schema-checked, checksummed, atomic.

A shard's file name appears only once its bytes are on disk, so a shard that exists is complete:
that is what lets a killed stage go on where it stopped. Page checksums are written and verified,
because without them most single-bit flips read back as silently wrong values.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

T = TypeVar("T")
IMAGE_ROWS_PER_GROUP = 100  # one row group of photographs stays near 10 MB


class ShardError(ValueError):
    """A shard that cannot be read or does not fit its schema; the message names file and cure."""


def shard_path(folder: Path, name: str, index: int) -> Path:
    """`folder/name-00042.parquet`."""
    return folder / f"{name}-{index:05d}.parquet"


def write(path: Path, rows: pa.Table | Sequence[dict[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one Parquet file, or leave no file at all.

    No rows, no file: `datasets` cannot load a Parquet file without rows, and one such shard would
    spoil a whole table. Raises ShardError when the rows do not fit the schema.
    """
    try:
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(list(rows), schema)
        table = table.select(schema.names).cast(schema).replace_schema_metadata(schema.metadata)
    except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
        raise ShardError(f"rows for {path.name} do not fit its schema: {error}") from error
    if table.num_rows == 0:
        return
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            row_group_size=IMAGE_ROWS_PER_GROUP if "image" in schema.names else None,
            write_page_checksum=True,
            write_page_index=True,
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def paths(folder: Path, name: str) -> list[Path]:
    """The files of one table, in order: `name.parquet` or `name-*.parquet`."""
    single = folder / f"{name}.parquet"
    found = [single] if single.exists() else sorted(folder.glob(f"{name}-[0-9]*.parquet"))
    if not found:
        raise ShardError(f"{folder} holds no {name} shards; re-run the stage that writes them")
    return found


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
    """Rows of one table, from the footers of its files."""
    return sum(pq.read_metadata(path).num_rows for path in paths(folder, name))


def iter_batches(
    path: Path, columns: Sequence[str] | None, batch_size: int
) -> Iterator[pa.RecordBatch]:
    """One shard as record batches, one in memory at a time, page checksums verified."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size, columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


def chunks(items: list[T], size: int) -> Iterable[list[T]]:
    """Consecutive slices of at most `size` items; a shard's rows depend on order alone."""
    return (items[start : start + size] for start in range(0, len(items), size))


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_file(
    path: Path, columns: Sequence[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """One shard as an Arrow table, page checksums verified; `where` skips row groups by statistics."""
    try:
        return pq.read_table(path, columns=columns, filters=where, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ShardError:
    return ShardError(
        f"{path} is damaged ({str(error).splitlines()[0]}); delete its folder and re-run the stage"
    )
