"""The images as Split holds them: a few numbers each, with texts read from disk when needed.

A million images take about fifteen megabytes this way. As Python objects, their ids, fingerprints
and labels would take a gigabyte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from tasks.tables import schemas, shards
from tasks.tables.ids import hashes

BLOCK = 1 << 17  # rows whose texts are in memory at a time


class Texts(Protocol):
    """A column of texts: an Arrow array, or a Column on disk."""

    def take(self, rows: np.ndarray) -> pa.Array: ...


class Column:
    """One column of a sharded table, read from disk for the rows asked for."""

    def __init__(self, folder: Path, table: str, name: str):
        self._name = name
        self._paths = shards.paths(folder, table)
        self._starts = np.cumsum([0, *map(shards.num_rows, self._paths)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: np.ndarray) -> pa.Array:
        """The texts of `rows`, which must ascend. Only the shards that hold some are read."""
        chunks = []
        edges = np.searchsorted(rows, self._starts)
        for index, path in enumerate(self._paths):
            if len(here := rows[edges[index] : edges[index + 1]]):
                batches = shards.iter_batches(path, [self._name], BLOCK)
                column = pa.chunked_array([batch[self._name] for batch in batches])
                chunks += column.take(here - self._starts[index]).chunks
        return pa.chunked_array(chunks, pa.string()).combine_chunks()


@dataclass
class Images:
    """Every image of a Download artifact, in its order.

    `labels` are class ids. `official` are indices into `parts`, the names of the splits; an image
    without an official split counts as `train`. `keys` are 64-bit hashes of the column `pixels`:
    equal for equal pictures, and almost never for others. `dhash` is empty if it was not asked for.
    """

    ids: Texts
    labels: np.ndarray  # int32
    official: np.ndarray  # int16
    parts: list[str]
    pixels: Texts
    keys: np.ndarray  # uint64
    dhash: np.ndarray  # uint64

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self) -> Iterator[np.ndarray]:
        """The indices of all images, BLOCK at a time."""
        for start in range(0, len(self), BLOCK):
            yield np.arange(start, min(start + BLOCK, len(self)))


def read_images(download: Path, with_dhash: bool) -> Images:
    """The images of a Download artifact. Raises ShardError when it is damaged."""
    ids = Column(download, "images", "image_id")
    number = {part: code for code, part in enumerate(schemas.SPLITS)}
    labels, official = np.empty(len(ids), np.int32), np.empty(len(ids), np.int16)
    keys, dhash = np.empty(len(ids), np.uint64), np.empty(len(ids) * with_dhash, np.uint64)
    start = 0
    columns = ["label", "official_split", "pixels", *["dhash"] * with_dhash]
    for path in shards.paths(download, "images"):
        for batch in shards.iter_batches(path, columns, BLOCK):
            here = slice(start, start + batch.num_rows)
            start += batch.num_rows
            labels[here] = batch["label"].to_numpy()
            splits = batch["official_split"].dictionary_encode()
            codes = [
                number.setdefault(s or "train", len(number)) for s in splits.dictionary.tolist()
            ]
            official[here] = np.array(codes, np.int16)[splits.indices.to_numpy()]
            keys[here] = hashes(batch["pixels"].tolist())
            if with_dhash:
                dhash[here] = batch["dhash"].to_numpy().view(np.uint64)
    pixels = Column(download, "images", "pixels")
    return Images(ids, labels, official, list(number), pixels, keys, dhash)
