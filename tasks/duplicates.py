"""The same picture twice, or nearly: what must not stand in train and in test.

Pictures are the same when their pixels are, whatever file holds them; they are near when their
difference hashes differ in a few of 64 bits (re-encoded, resized or slightly cropped copies).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 22  # comparisons made at once
# A difference hash with fewer bits set, or more, is of a picture with hardly any structure, such as
# a clear sky: others are near it that show something else. It is compared by its pixels only.
MIN_BITS, MAX_BITS = 12, 52


class Twin(NamedTuple):
    """Image number `later` shows what `earlier` shows; `distance` in bits, -1: the same pixels."""

    later: int
    earlier: int
    distance: int


def twins(
    pixels: Sequence[str], dhash: Sequence[int], part: Sequence[int], max_distance: int = 0
) -> list[Twin]:
    """For each image the one of a lower `part` that is most like it, if any; by ascending index.

    `pixels` and `dhash` are the fingerprints of `tasks.images.Picture`. Up to `max_distance` bits
    count as near; 0: only the same pixels. Of several alike, the first is named.
    """
    parts = np.asarray(part, dtype=np.int64)
    found = _same(pixels, parts)
    if max_distance:
        hashes = np.asarray(dhash, dtype=np.int64).view(np.uint64)
        for index, (distance, earlier) in _near(hashes, parts, max_distance).items():
            found.setdefault(index, Twin(index, earlier, distance))
    return [found[index] for index in sorted(found)]


def _same(pixels: Sequence[str], parts: np.ndarray) -> dict[int, Twin]:
    first: dict[str, int] = {}
    found = {}
    for index in np.lexsort((np.arange(len(parts)), parts)).tolist():
        earlier = first.setdefault(pixels[index], index)
        if parts[earlier] < parts[index]:
            found[index] = Twin(index, earlier, -1)
    return found


def _near(hashes: np.ndarray, parts: np.ndarray, max_distance: int) -> dict[int, tuple[int, int]]:
    """Index -> (distance, earlier index).

    Two hashes that differ in at most d bits agree in at least one of d + 1 bands of bits, so only
    those that share a band are compared.
    """
    best: dict[int, tuple[int, int]] = {}
    told = np.bitwise_count(hashes)
    telling = np.flatnonzero((told >= MIN_BITS) & (told <= MAX_BITS))
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        for bucket in _buckets(hashes[telling] >> np.uint64(low) & mask):
            for i, j, distances in _compare(telling[bucket], hashes, parts, max_distance):
                for one, other, distance in zip(i, j, distances, strict=True):
                    candidate = (int(distance), int(other))
                    best[int(one)] = min(best.get(int(one), candidate), candidate)
    return best


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices that share a key, where there are two or more."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order])) + 1
    return (bucket for bucket in np.split(order, starts) if len(bucket) > 1)


def _compare(
    bucket: np.ndarray, hashes: np.ndarray, parts: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each image of the bucket that has one, the nearest of a lower part: i, j, distances."""
    if (parts[bucket] == parts[bucket[0]]).all():
        return
    for rows in np.array_split(bucket, len(bucket) ** 2 // BLOCK + 1):
        distances = np.bitwise_count(hashes[rows, None] ^ hashes[None, bucket]).astype(np.int16)
        distances[parts[rows, None] <= parts[None, bucket]] = 65
        nearest = distances.argmin(axis=1)
        least = distances[np.arange(len(rows)), nearest]
        near = least <= max_distance
        yield rows[near], bucket[nearest[near]], least[near]
