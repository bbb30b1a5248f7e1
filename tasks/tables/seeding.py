"""Random generators that depend on (seed, row key) alone, never on the order of rows."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.random import PCG64, Generator

_WORD = 0xFFFFFFFF


def row_generator(seed: int, key: str) -> Generator:
    """A generator that depends on (seed, key) alone."""
    return np.random.default_rng([seed, _number(key)])


def row_generators(seed: int, keys: Sequence[str]) -> Iterator[Generator]:
    """`row_generator(seed, key)` for each key, in half the time."""
    words = np.empty((len(keys), 3), np.uint32)
    numbers = np.array([_number(key) for key in keys], np.uint64)
    words[:, 0], words[:, 1], words[:, 2] = seed & _WORD, numbers & np.uint64(_WORD), numbers >> 32
    for key, entropy in zip(keys, words, strict=True):
        # numpy splits each number into 32-bit words; given those words it has little left to do.
        # A number of another length would be another count of words.
        plain = seed <= _WORD and entropy[2]
        yield Generator(PCG64(entropy)) if plain else row_generator(seed, key)


def place_of(key: str) -> int:
    """A number of 64 bits that depends on the key alone, to order or to choose by."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _number(key: str) -> int:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
