"""Writes and reads Parquet shards: checked against a schema, with page checksums, atomically.

A shard gets its file name only once its bytes are on disk (`tasks.tables.writer`). So a shard that
exists is complete, and a killed stage resumes after the last one. Page checksums are written and
verified, because without them most single-bit flips would read back as silently wrong values.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.runtime.errors import ShardError
from tasks.tables.durable import sha256_file as sha256_file  # also used as `shards.sha256_file`
from tasks.tables.durable import sync as sync
from tasks.tables.durable import sync_tree as sync_tree
from tasks.tables.durable import write_text as write_text
from tasks.tables.writer import Writer as Writer  # also used as `shards.Writer`
from tasks.tables.writer import parts as parts
from tasks.tables.writer import write as write

T = TypeVar("T")


def shard_path(folder: Path, name: str, index: int) -> Path:
    """`folder/name-00042.parquet`."""
    return folder / f"{name}-{index:05d}.parquet"


def paths(folder: Path, name: str) -> list[Path]:
    """The files of one table, in order: `name.parquet` or `name-*.parquet`, parts included.

    Raises ShardError when there are none.
    """
    single = folder / f"{name}.parquet"
    files = parts(single) if single.exists() else sorted(folder.glob(f"{name}-[0-9]*.parquet"))
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
