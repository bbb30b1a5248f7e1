"""Writes and reads Parquet shards: checked against a schema, with page checksums, atomically.

A shard gets its file name only once its bytes are on disk (`tasks.tables.writer`). So a shard that
exists is complete, and a killed stage resumes after the last one. Page checksums are written and
verified, because without them most single-bit flips would read back as silently wrong values.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.runtime.errors import ShardError
from tasks.tables.durable import sha256_file as sha256_file  # also used as `shards.sha256_file`
from tasks.tables.durable import sync as sync
from tasks.tables.durable import sync_tree as sync_tree
from tasks.tables.durable import write_text as write_text
from tasks.tables.ids import AT_ONCE, Index, hashes
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
    with _opened(path) as file:
        if columns is not None:
            _require(path, file.schema_arrow.names, columns)
        yield from file.iter_batches(batch_size, row_groups, columns)


class ImageStore:
    """The encoded images of a Download artifact by image id. Only the row groups needed are read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, image_ids: Sequence[str]) -> dict[str, bytes]:
        """Encoded bytes by image id. Raises ShardError when an image is missing or damaged."""
        wanted = list(dict.fromkeys(image_ids))
        groups, index = self._row_groups
        first = index.first(hashes(wanted))
        lost = [image_id for image_id, number in zip(wanted, first, strict=True) if number < 0]
        images = {} if lost else self._read(groups, set(first.tolist()), set(wanted))
        if unread := [image_id for image_id in wanted if image_id not in images and not lost]:
            # Where another image's id has the same hash, the image is in a further row group.
            numbers = {number for hashed in hashes(unread) for number in index.every(hashed)}
            images |= self._read(groups, numbers, set(unread))
            lost = [image_id for image_id in unread if image_id not in images]
        if lost:
            raise ShardError(f"{len(lost)} images are not in {self.folder}, the first: {min(lost)}")
        return images

    def _read(
        self, groups: Sequence[tuple[Path, int]], numbers: set[int], wanted: set[str]
    ) -> dict[str, bytes]:
        """The images among `wanted` in the row groups with these numbers."""
        images: dict[str, bytes] = {}
        by_file: dict[Path, list[int]] = {}
        for number in sorted(numbers):
            path, group = groups[number]
            by_file.setdefault(path, []).append(group)
        for path, of_file in by_file.items():
            with _opened(path) as file:
                for group in of_file:
                    for row in file.read_row_group(group, ["image_id", "image"]).to_pylist():
                        if row["image_id"] in wanted:
                            images[row["image_id"]] = row["image"]["bytes"]
        return images

    @cached_property
    def _row_groups(self) -> tuple[list[tuple[Path, int]], Index]:
        """The row groups (file, number in it), and where each image is, read from the ids alone."""
        groups: list[tuple[Path, int]] = []
        hashed, sizes = [], []
        for path in paths(self.folder, "images"):
            with _opened(path) as file:
                for group in range(file.num_row_groups):
                    ids = file.read_row_group(group, ["image_id"])["image_id"].to_pylist()
                    hashed.append(hashes(ids))
                    sizes.append(len(ids))
                    groups.append((path, group))
        numbers = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
        return groups, Index(np.concatenate(hashed), numbers)


def repeated_bytes(folder: Path) -> Callable[[str], bool]:
    """Tells of a SHA-256 whether the bytes of several images of a Download artifact have it.

    It goes by 64 bits of it: a yes is wrong for one image in billions, a no never is.
    """
    numbers = []
    for path in paths(folder, "images"):
        for batch in iter_batches(path, ["sha256"], AT_ONCE):
            numbers.append(
                np.array([_prefix(text) for text in batch["sha256"].tolist()], np.uint64)
            )
    ordered = np.concatenate(numbers)
    ordered.sort()
    several = frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    return lambda sha256: _prefix(sha256) in several


def _prefix(sha256: str) -> int:
    return int(sha256[:16], 16)


def largest_images(
    folder: Path, wanted: NDArray[np.uint64], count: int
) -> tuple[list[str], set[int]]:
    """The `count` largest images of a Download artifact, by their pixels, among some of them.

    `wanted` are hashes of image ids (`tasks.tables.ids`). Also returns those that no image has.
    """
    ordered = np.unique(wanted)
    found = np.zeros(len(ordered), bool)
    largest: list[tuple[int, int, str]] = []  # less pixels, place in the artifact, image id
    start = 0
    for path in paths(folder, "images"):
        for batch in iter_batches(path, ["image_id", "width", "height"], AT_ONCE):
            ids = batch["image_id"].to_pylist()
            hashed = hashes(ids)
            places = np.minimum(np.searchsorted(ordered, hashed), len(ordered) - 1)
            here = np.flatnonzero(ordered[places] == hashed).tolist()
            found[places[here]] = True
            pixels = np.asarray(batch["width"]).astype(int) * np.asarray(batch["height"])
            own = ((-int(pixels[at]), start + at, ids[at]) for at in here)
            largest = heapq.nsmallest(count, [*largest, *own])
            start += len(ids)
    return [image_id for *_, image_id in largest], set(ordered[~found].tolist())


def chunks(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
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
            _require(path, pq.read_schema(path).names, columns)
        return pq.read_table(path, columns=columns, filters=where, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """The open file, page checksums verified. What cannot be read in it is a ShardError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, error) from error


def _require(path: Path, present: Sequence[str], columns: Sequence[str]) -> None:
    """Raise ShardError when the file lacks one of `columns`: another version wrote it."""
    if lost := [name for name in columns if name.split(".")[0] not in present]:
        raise ShardError(
            f"{path} has no column {lost[0]}: it was written by another version; delete its folder "
            "and re-run the stage"
        )


def lost_images(folder: Path, image_ids: Sequence[str]) -> ShardError:
    """The error that these images are not in a Download artifact."""
    return ShardError(f"{len(image_ids)} images are not in {folder}, the first: {min(image_ids)}")


def _damaged(path: Path, error: Exception) -> ShardError:
    return ShardError(
        f"{path} is damaged ({str(error).splitlines()[0]}); delete its folder and re-run the stage"
    )
