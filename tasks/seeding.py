"""Random generators that depend on (seed, row key) alone, never on the order of rows."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

# Constants of the seeding algorithm that numpy.random.SeedSequence documents and keeps stable.
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = 0xCA01F9DD, 0x4973F715
_POOL, _WORDS, _MASK = 4, 8, 0xFFFFFFFF


def row_generator(seed: int, key: str) -> np.random.Generator:
    """A generator that depends on (seed, key) alone."""
    return np.random.default_rng([seed, _number(key)])


def row_generators(seed: int, keys: Sequence[str]) -> Iterator[np.random.Generator]:
    """`row_generator(seed, key)` for each key, seeded all at once: a tenth of the time."""
    numbers = [_number(key) for key in keys]
    states = _states(seed, np.array(numbers, np.uint64)) if seed <= _MASK else None
    for place, number in enumerate(numbers):
        if states is None or number <= _MASK:  # another count of words is mixed otherwise
            yield np.random.default_rng([seed, number])
        else:
            yield np.random.Generator(np.random.PCG64(_Seeded(states[place])))  # type: ignore[arg-type]


class _Seeded(ISeedSequence):
    """What a bit generator asks its seed for, computed beforehand."""

    def __init__(self, state: NDArray[np.uint64]):
        self.state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[np.uint64]:
        return self.state


def _number(key: str) -> int:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _states(seed: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`SeedSequence([seed, number]).generate_state(4, uint64)` as rows; numbers above 32 bits."""
    low, high = (numbers & np.uint64(_MASK)).astype(np.uint32), numbers >> np.uint64(32)
    entropy = [np.full_like(low, seed), low, high.astype(np.uint32), np.zeros_like(low)]
    constant = _INIT_A

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * _MULT_A & _MASK
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    pool = [hashed(words) for words in entropy]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                other = hashed(pool[source])
                mixed = pool[target] * np.uint32(_MIX_LEFT) - other * np.uint32(_MIX_RIGHT)
                pool[target] = mixed ^ mixed >> np.uint32(16)
    words = np.empty((len(numbers), _WORDS), np.uint32)
    constant = _INIT_B
    for place in range(_WORDS):
        value = pool[place % _POOL] ^ np.uint32(constant)
        constant = constant * _MULT_B & _MASK
        value = value * np.uint32(constant)
        words[:, place] = value ^ value >> np.uint32(16)
    return words.astype("<u4").view("<u8").astype(np.uint64)
