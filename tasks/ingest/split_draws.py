"""The random draws of Split: shares of each class, CoOp's few shots, and a cap on train images.

Each class has its own generator, seeded with (seed, class), which draws from the class's images in
the order of their ids. So a class's split depends neither on other classes nor on the order of files.
"""

import bisect
import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from tasks.ingest import split_images
from tasks.ingest.split_images import Images

MAX_VAL_SHOTS = 4  # as many as CoOp keeps for validation


class FileOrder(NamedTuple):
    """The images of a split file, in its order: what CoOp's few-shot draw is made over.

    Three arrays of one length. `rows` are indices into `Images`, -1 for an unusable image. `labels`
    are the file's classes as numbers, `parts` its splits as indices into `Images.parts`.
    """

    rows: np.ndarray
    labels: np.ndarray
    parts: np.ndarray


def assign(
    images: Images,
    num_base: int,
    shares: dict[str, float],
    seed: int,
    *,
    val_per_class: int = 0,
    shots: int = 0,
    order: FileOrder | None = None,
) -> np.ndarray:
    """The split of every image, as its index in `images.parts`.

    `shares` maps a split to its share of a class's train images; splits that the source already
    fills are not drawn. With `order` the few shots are those that CoOp draws from that split file.
    """
    split_codes = images.official.copy()
    settled = {images.parts[code] for code in np.unique(split_codes)}
    drawn = {part: share for part, share in shares.items() if part not in settled}
    if any(drawn.values()) or ("val" in drawn and val_per_class):
        for label, rows in _train_by_id(images):
            shuffled = np.random.default_rng([seed, label]).permutation(rows)
            start = 0
            for part, share in drawn.items():
                count = math.ceil(share * len(shuffled))
                if part == "val" and val_per_class:
                    count = val_per_class
                split_codes[shuffled[start : start + count]] = images.parts.index(part)
                start += count
    if shots:
        if order is None:
            order = FileOrder(np.arange(len(images)), images.labels, split_codes.copy())
        _keep_few(images, split_codes, shots, seed, order)
    train, unused = map(images.parts.index, ("train", "unused"))
    split_codes[(split_codes == train) & (images.labels >= num_base)] = unused
    return split_codes


def cap(images: Images, split_codes: np.ndarray, count: int, seed: int) -> None:
    """Keep `count` train images, spread over the classes as evenly as possible; the rest is unused."""
    train, unused = map(images.parts.index, ("train", "unused"))
    sizes = np.bincount(images.labels[split_codes == train])
    if not count or sizes.sum() <= count:
        return
    # One image of each class in turn, until there are enough.
    taken = bisect.bisect_right(range(count + 1), count, key=lambda n: np.minimum(sizes, n).sum())
    turns = taken - 1
    kept = np.minimum(sizes, turns)
    kept[np.flatnonzero(sizes > turns)[: count - kept.sum()]] += 1
    for rows in _few_classes(images.labels, split_codes == train):
        for label, members in _by_class(images.labels, rows):
            order = np.random.default_rng([seed, label, 1]).permutation(members)
            split_codes[order[kept[label] :]] = unused


def _keep_few(
    images: Images, split_codes: np.ndarray, shots: int, seed: int, order: FileOrder
) -> None:
    """Mark as unused the train and val images that CoOp's few-shot draw does not take.

    As in CoOp (https://github.com/KaiyangZhou/CoOp, by `generate_fewshot_dataset` of Dassl) one
    generator serves all: train before val, labels in order of first appearance, each label's images in
    the given order. A class with fewer images keeps all of them. An unusable image is drawn like any
    other, and is then lacking.
    """
    rng = random.Random(seed)
    usable = order.rows >= 0
    parts = np.where(usable, split_codes[order.rows], order.parts)
    drawn = lacking = 0
    for part, count in (("train", shots), ("val", min(shots, MAX_VAL_SHOTS))):
        code = images.parts.index(part)
        kept: list[np.ndarray] = []
        classes = [members for _, members in _by_class(order.labels, np.flatnonzero(parts == code))]
        for members in sorted(classes, key=lambda members: members[0]):
            few = len(members) >= count
            kept.append(members[rng.sample(range(len(members)), count)] if few else members)
        taken = np.concatenate([np.empty(0, np.int64), *kept])
        split_codes[split_codes == code] = images.parts.index("unused")
        split_codes[order.rows[taken[usable[taken]]]] = code
        drawn += len(taken)
        lacking += int((~usable[taken]).sum())
    if lacking:
        print(
            f"split: {lacking} of the {drawn} images of the few-shot draw are unusable and lacking"
        )


def _train_by_id(images: Images) -> Iterator[tuple[int, np.ndarray]]:
    """(class, indices of its train images by ascending id)."""
    train = images.official == images.parts.index("train")
    for rows in _few_classes(images.labels, train):
        order = pc.sort_indices(images.ids.take(rows)).to_numpy()
        yield from _by_class(images.labels, rows[order])


def _few_classes(labels: np.ndarray, selected: np.ndarray) -> Iterator[np.ndarray]:
    """The indices of the images in the mask `selected`: a few whole classes, about a block, at a time."""
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
    """(class, its indices among `rows`, in the given order)."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[rows], prepend=-1))
    for members in np.split(rows, starts[1:]):
        if len(members):
            yield int(labels[members[0]]), members
