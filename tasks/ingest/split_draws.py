"""The draws of Split: shares of each class, CoOp's few shots, and a cap on train images.

Each class has a generator of its own, seeded with (seed, class), that draws from its images in the
order of their ids: what becomes of one class depends on no other, and on no order of files.
"""

import bisect
import math
import random
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from tasks.ingest import split_images
from tasks.ingest.split_images import Images

MAX_VAL_SHOTS = 4  # as many as CoOp keeps for validation


def assign(
    images: Images,
    num_base: int,
    shares: dict[str, float],
    seed: int,
    *,
    val_per_class: int = 0,
    shots: int = 0,
) -> np.ndarray:
    """The split of every image, as its number in `images.parts`."""
    place = images.official.copy()
    settled = {images.parts[code] for code in np.unique(place)}
    drawn = {part: share for part, share in shares.items() if part not in settled}
    if any(drawn.values()) or ("val" in drawn and val_per_class):
        for label, rows in _train_by_id(images):
            order = np.random.default_rng([seed, label]).permutation(rows)
            start = 0
            for part, share in drawn.items():
                count = math.ceil(share * len(order))
                if part == "val" and val_per_class:
                    count = val_per_class
                place[order[start : start + count]] = images.parts.index(part)
                start += count
    if shots:
        _keep_few(images, place, shots, seed)
    train, unused = map(images.parts.index, ("train", "unused"))
    place[(place == train) & (images.labels >= num_base)] = unused
    return place


def cap(images: Images, place: np.ndarray, count: int, seed: int) -> None:
    """Keep `count` train images, as evenly over the classes as they allow; the rest is unused."""
    train, unused = map(images.parts.index, ("train", "unused"))
    sizes = np.bincount(images.labels[place == train])
    if not count or sizes.sum() <= count:
        return
    # One of each class in turn, until there are enough.
    taken = bisect.bisect_right(range(count + 1), count, key=lambda n: np.minimum(sizes, n).sum())
    turns = taken - 1
    kept = np.minimum(sizes, turns)
    kept[np.flatnonzero(sizes > turns)[: count - kept.sum()]] += 1
    for rows in _few_classes(images.labels, place == train):
        for label, members in _by_class(images.labels, rows):
            order = np.random.default_rng([seed, label, 1]).permutation(members)
            place[order[kept[label] :]] = unused


def _keep_few(images: Images, place: np.ndarray, shots: int, seed: int) -> None:
    """Make unused what a few-shot draw does not take of the train and val images.

    One generator for all: labels in order of first appearance, train before val, each label's
    images in the order given. A class with fewer images keeps all of them.
    """
    rng = random.Random(seed)
    for part, count in (("train", shots), ("val", min(shots, MAX_VAL_SHOTS))):
        rows = np.flatnonzero(place == images.parts.index(part))
        classes = [members for _, members in _by_class(images.labels, rows)]
        for members in sorted(classes, key=lambda members: members[0]):
            if len(members) >= count:
                kept = rng.sample(range(len(members)), count)
                place[np.delete(members, kept)] = images.parts.index("unused")


def _train_by_id(images: Images) -> Iterator[tuple[int, np.ndarray]]:
    """Each class's train images by ascending id."""
    train = images.official == images.parts.index("train")
    for rows in _few_classes(images.labels, train):
        order = pc.sort_indices(images.ids.take(rows)).to_numpy()
        yield from _by_class(images.labels, rows[order])


def _few_classes(labels: np.ndarray, selected: np.ndarray) -> Iterator[np.ndarray]:
    """The chosen images, those of a few whole classes at a time, and not many more than a block."""
    sizes = np.bincount(labels[selected])
    first = total = 0
    for label, size in enumerate(sizes.tolist()):
        if total and total + size > split_images.BLOCK:
            yield np.flatnonzero(selected & (labels >= first) & (labels < label))
            first, total = label, 0
        total += size
    if total:
        yield np.flatnonzero(selected & (labels >= first))


def _by_class(labels: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """`rows` apart by class, each class's in the order given."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[rows], prepend=-1))
    for members in np.split(rows, starts[1:]):
        if len(members):
            yield int(labels[members[0]]), members
