"""Pictures that stand twice: found by their pixels, or by difference hashes a few bits apart."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingest import duplicates
from tasks.ingest.duplicates import Twin, twins


def signed(value: int) -> int:
    return value - (value >> 63 << 64)


def telling(value: int) -> bool:
    return duplicates.MIN_BITS <= value.bit_count() <= duplicates.MAX_BITS


def one_by_one(hashes: list[int], part: list[int], limit: int) -> dict[int, int]:
    """The least distance of each image to one of a lower part, by comparing all with all."""
    found = {}
    for i, mine in enumerate(hashes):
        near = [
            (mine ^ other).bit_count()
            for j, other in enumerate(hashes)
            if part[j] < part[i] and telling(mine) and telling(other)
        ]
        if near and min(near) <= limit:
            found[i] = min(near)
    return found


@given(st.integers(0, 2**32), st.integers(1, 10))
def test_every_near_pair_is_found_and_no_other(seed, limit):
    rng = random.Random(seed)
    seeds = [rng.getrandbits(64) for _ in range(4)]
    hashes = []
    for _ in range(40):
        value = rng.choice(seeds)
        for _ in range(rng.randrange(2 * limit)):
            value ^= 1 << rng.randrange(64)
        hashes.append(value)
    part = [rng.randrange(3) for _ in hashes]
    names = [str(i) for i in range(len(hashes))]
    found = twins(names, [signed(value) for value in hashes], part, limit)
    assert {t.later: t.distance for t in found} == one_by_one(hashes, part, limit)
    for twin in found:
        assert (hashes[twin.later] ^ hashes[twin.earlier]).bit_count() == twin.distance
        assert part[twin.earlier] < part[twin.later]


def test_large_buckets_are_compared_in_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 64)
    rng = random.Random(1)
    value = 0x0F0F0F0F0F0F0F0F
    hashes = [value ^ 1 << rng.randrange(64) for _ in range(60)]
    part = [i % 2 for i in range(60)]
    found = twins([str(i) for i in range(60)], [signed(h) for h in hashes], part, 3)
    assert {t.later: t.distance for t in found} == one_by_one(hashes, part, 3)
    assert len(found) == 30


def test_the_same_pixels_need_no_hash_and_name_the_first():
    pixels = ["a", "b", "a", "c", "a", "b"]
    assert twins(pixels, [0] * 6, [0, 1, 0, 0, 1, 1]) == [Twin(4, 0, -1)]
    assert twins(pixels, [0] * 6, [1, 0, 0, 0, 1, 1]) == [
        Twin(0, 2, -1),
        Twin(4, 2, -1),
        Twin(5, 1, -1),
    ]


def test_pictures_without_structure_are_not_near_each_other():
    assert twins(["a", "b"], [0, 1], [0, 1], 10) == []
    assert twins(["a", "b"], [-1, -2], [0, 1], 10) == []


def test_many_hashes_are_compared_without_a_table_of_all_pairs(monkeypatch):
    compared = 0
    original = np.bitwise_count

    def counted(values, *rest):
        nonlocal compared
        compared += values.size
        return original(values, *rest)

    monkeypatch.setattr(duplicates.np, "bitwise_count", counted)
    rng = np.random.default_rng(0)
    hashes = rng.integers(-(2**63), 2**63, 20_000, dtype=np.int64)
    twins([str(i) for i in range(20_000)], hashes, np.arange(20_000) % 2, 4)
    assert compared < 20_000**2 / 100
