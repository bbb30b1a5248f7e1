"""Finds duplicate and near-duplicate images, which must not be in train and in test.

Two images are the same when their pixels are equal, whatever the files. They are near when their
difference hashes differ in a few of 64 bits: re-encoded, resized or slightly cropped copies.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1 << 20  # comparisons made at once
# A picture with hardly any structure, such as a clear sky, has a difference hash with very few or
# very many bits set, and is near to pictures of other things. It is compared by its pixels only.
MIN_BITS, MAX_BITS = 12, 52


class Twin(NamedTuple):
    """Image number `later` repeats number `earlier`; `distance` in bits, -1 for the same pixels."""

    later: int
    earlier: int
    distance: int


class Twins(NamedTuple):
    """Many of them as columns, by ascending `later`."""

    later: np.ndarray
    earlier: np.ndarray
    distance: np.ndarray


def twins(
    pixels: Sequence[str], dhash: Sequence[int], part: Sequence[int], max_distance: int = 0
) -> list[Twin]:
    """For each image its nearest one of a lower `part`, if there is one; by ascending index.

    `pixels` and `dhash` are the fingerprints of `tasks.ingest.pictures.Picture`. Hashes up to
    `max_distance` bits apart count as near; with 0, only the same pixels do. Ties go to the first.
    """
    parts = np.asarray(part, dtype=np.int64)
    pairs = same(np.unique(list(pixels), return_inverse=True)[1], parts)
    if max_distance:
        hashes = np.asarray(dhash, dtype=np.int64).view(np.uint64)
        pairs = joined(pairs, near(hashes, parts, max_distance))
    return [Twin(*row) for row in zip(*(column.tolist() for column in pairs), strict=True)]


def repeated(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The indices of images that share their key with another; the mask `among` says which count."""
    ordered = keys[among]
    ordered.sort()
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    blocks = (slice(start, start + BLOCK) for start in range(0, len(keys), BLOCK))
    rows = [b.start + np.flatnonzero(among[b] & np.isin(keys[b], again)) for b in blocks]
    return np.concatenate(rows) if rows else np.empty(0, np.int64)


def same(pixels: np.ndarray, parts: np.ndarray) -> Twins:
    """The twins with the same pixels. `pixels` are numbers, equal for equal pictures."""
    order = np.lexsort((parts, pixels))
    starts = np.flatnonzero(np.diff(pixels[order], prepend=-1))
    first = np.repeat(order[starts], np.diff(starts, append=len(order)))
    is_later = parts[order] > parts[first]
    later, earlier = order[is_later], first[is_later]
    ascending = np.argsort(later)
    return Twins(later[ascending], earlier[ascending], np.full(len(later), -1))


def near(hashes: np.ndarray, parts: np.ndarray, max_distance: int) -> Twins:
    """The twins whose hashes are at most `max_distance` bits apart. Negative parts do not count.

    Two hashes that differ in at most d bits are equal in at least one of d + 1 bands of bits. So
    only hashes that share a band are compared.
    """
    least = np.full(len(hashes), 255, np.uint8)
    earlier = np.zeros(len(hashes), np.int32)
    bits_set = np.bitwise_count(hashes)
    usable = np.flatnonzero((bits_set >= MIN_BITS) & (bits_set <= MAX_BITS) & (parts >= 0))
    edges = np.linspace(0, 64, max_distance + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        for bucket in _buckets(hashes[usable] >> np.uint64(low) & mask):
            for i, j, distances in _compare(usable[bucket], hashes, parts, max_distance):
                better = (distances < least[i]) | ((distances == least[i]) & (j < earlier[i]))
                least[i[better]], earlier[i[better]] = distances[better], j[better]
    rows = np.flatnonzero(least <= max_distance)
    return Twins(rows, earlier[rows].astype(np.int64), least[rows].astype(np.int64))


def joined(first: Twins, second: Twins) -> Twins:
    """The twins of both; where both have one for an image, that of `first`."""
    new = ~np.isin(second.later, first.later)
    both = [np.concatenate((a, b[new])) for a, b in zip(first, second, strict=True)]
    order = np.argsort(both[0])
    return Twins(*(column[order] for column in both))


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The groups of two or more indices that share a key."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
    sizes = np.diff(starts, append=len(order))
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        yield order[start : start + size]


def _compare(
    bucket: np.ndarray, hashes: np.ndarray, parts: np.ndarray, max_distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(images, their nearest ones of a lower part, distances) for the images of a bucket that have one."""
    if (parts[bucket] == parts[bucket[0]]).all():
        return
    for rows in np.array_split(bucket, len(bucket) ** 2 // BLOCK + 1):
        distances = np.bitwise_count(hashes[rows, None] ^ hashes[None, bucket]).astype(np.int16)
        distances[parts[rows, None] <= parts[None, bucket]] = 65
        nearest = distances.argmin(axis=1)
        least = distances[np.arange(len(rows)), nearest]
        near = least <= max_distance
        yield rows[near], bucket[nearest[near]], least[near]
