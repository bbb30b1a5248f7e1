"""Reads rollouts in blocks of consecutive images, one block in memory at a time.

Propose writes the shards in the order of the split, and they are read in one pass. The files may
have any numbers, and the rows of a block any order.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.language.answer_column import read_answers
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.ids import Ids

BATCH_ROWS = 16_384
COLUMNS = ["image_id", "rollout", "completion", "mean_logprob"]
# Log-probabilities are added as whole multiples of 2**-36 nats, so that no order of adding shows.
LOGPROB_UNIT = 2.0**36
_LOGPROB_FLOOR = 1024.0


@dataclass(frozen=True)
class Block:
    """All rollouts of the images `start` to `stop`, one row a rollout, in any order.

    `image` counts from `start`. `answer` indexes `texts` and `problems`, as in
    `tasks.language.answer_column.Answers`. `logprob` is in units of 1 / LOGPROB_UNIT nats.
    """

    start: int
    stop: int
    image: NDArray[np.int64]
    answer: NDArray[np.int64]
    logprob: NDArray[np.int64]
    texts: list[str | None]
    problems: list[str]


def blocks(
    folder: Path,
    image_ids: Sequence[str],
    size: int,
    first: int | None = None,
    table: str = "rollouts",
) -> Iterator[Block]:
    """The rollouts in a table of `folder`, `size` consecutive images of `image_ids` at a time.

    With `first`, only the first so many rollouts of each image. Rollouts of other images are left out;
    an image may have none. Raises StageError when the images are out of order, or a rollout of an image
    is there twice.
    """
    ids = image_ids if isinstance(image_ids, Ids) else Ids(image_ids)
    where = None if first is None else pc.field("rollout") < first
    edges = [*range(0, len(ids), size), len(ids)]
    pending, number = _Pending(), 0
    for block, batch, positions in by_block(folder, table, ids, size, COLUMNS, where):
        while number < block:
            yield pending.block(folder, ids, edges[number], edges[number + 1])
            pending, number = _Pending(), number + 1
        pending.add(positions, batch)
    while number < len(edges) - 1:
        yield pending.block(folder, ids, edges[number], edges[number + 1])
        pending, number = _Pending(), number + 1


def by_block(
    folder: Path,
    table: str,
    image_ids: Ids,
    size: int,
    columns: Sequence[str],
    where: pc.Expression | None = None,
) -> Iterator[tuple[int, pa.RecordBatch, NDArray[np.int64]]]:
    """A table's rows as (block, rows, their images' positions), by ascending block of `size` images.

    A block may come in several parts, in any order of rows. Rows of other images, and those that do not
    fit `where`, are left out. Raises StageError where blocks are out of order.
    """
    for path in _in_order(folder, table, image_ids, size):
        for batch in shards.iter_batches(path, columns, BATCH_ROWS):
            if where is not None:
                batch = batch.filter(where)
            positions = _positions(batch, image_ids)
            owner = positions // size
            for block in np.unique(owner[positions >= 0]).tolist():
                here = owner == block
                yield block, batch if here.all() else batch.filter(pa.array(here)), positions[here]


def logprob_units(values: NDArray) -> NDArray[np.int64]:
    """Mean log-probabilities (nats, float) as whole units; a missing one counts as 0.

    Sums of whole numbers do not depend on their order.
    """
    known = np.nan_to_num(np.asarray(values, np.float64), nan=0.0)
    return np.rint(np.clip(known, -_LOGPROB_FLOOR, _LOGPROB_FLOOR) * LOGPROB_UNIT).astype(np.int64)


class _Pending:
    """Collects the rows of one block, with the block's own list of distinct answers."""

    def __init__(self) -> None:
        self.parts: list[tuple[NDArray, NDArray, NDArray, NDArray]] = []
        self.known: dict[tuple[str | None, str], int] = {}

    def add(self, positions: NDArray[np.int64], batch: pa.RecordBatch) -> None:
        read = read_answers(batch.column("completion"))
        pairs = zip(read.texts, read.problems, strict=True)
        own = np.array([self.known.setdefault(p, len(self.known)) for p in pairs], np.int64)
        logprob = batch.column("mean_logprob").to_numpy(zero_copy_only=False)
        rollout = batch.column("rollout").to_numpy(zero_copy_only=False).astype(np.int64)
        self.parts.append((positions, rollout, own[read.codes], logprob_units(logprob)))

    def block(self, folder: Path, image_ids: Sequence[str], start: int, stop: int) -> Block:
        empty = np.empty(0, np.int64)
        columns = [np.concatenate(c) for c in zip(*self.parts, strict=True)] or [empty] * 4
        positions, rollout, answer, logprob = columns
        low = rollout.min() if len(rollout) else 0
        width = int(rollout.max(initial=0) - low) + 1
        joint = np.sort((positions - start) * width + (rollout - low))
        same = np.flatnonzero(np.diff(joint) == 0)
        if len(same):
            image_id = image_ids[start + joint[same[0]] // width]
            raise StageError(f"{folder} holds rollouts of {image_id} twice; delete and re-run it")
        texts, problems = [text for text, _ in self.known], [why for _, why in self.known]
        return Block(start, stop, positions - start, answer, logprob, texts, problems)


def _in_order(folder: Path, table: str, image_ids: Ids, size: int) -> list[Path]:
    """The files in the order of their images. Raises StageError where blocks are out of order."""
    spans = []
    for path in shards.paths(folder, table):
        first = last = -1
        for batch in shards.iter_batches(path, ["image_id"], BATCH_ROWS):
            positions = _positions(batch, image_ids)
            owner = positions[positions >= 0] // size
            if not len(owner):
                continue
            if owner[0] < last or (np.diff(owner) < 0).any():
                raise _out_of_order(folder, f"within {path.name}")
            first, last = (owner[0] if first < 0 else first), owner[-1]
        spans.append((first, last, path))
    spans.sort()
    for before, after in itertools.pairwise(spans):
        if 0 <= after[0] < before[1]:
            raise _out_of_order(folder, f"between {before[2].name} and {after[2].name}")
    return [path for *_, path in spans]


def _out_of_order(folder: Path, location: str) -> StageError:
    return StageError(
        f"{folder} holds rollouts whose images are not in the order of the split, {location}; sort them "
        "by it, or delete the folder and re-run Propose"
    )


def _positions(batch: pa.RecordBatch, image_ids: Ids) -> NDArray[np.int64]:
    """Each row's position in the split, -1 where its image is not wanted."""
    encoded = batch.column("image_id").dictionary_encode()
    known = image_ids.positions(Ids(encoded.dictionary))
    return known[encoded.indices.to_numpy(zero_copy_only=False)]
