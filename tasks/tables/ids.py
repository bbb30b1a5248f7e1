"""Many image ids in little memory: as Arrow texts, found by 64-bit hashes.

A million ids in a dictionary of Python's take two hundred megabytes; here they take about fifty.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

AT_ONCE = 1 << 14  # ids that are Python objects at a time


class Index:
    """Finds numbers by image ids, of which it holds the hashes alone: twelve bytes each.

    Two ids can have one hash, once in 30 million sets of a million ids. So the number found may be
    another id's, and whoever asks must look at the id there.
    """

    def __init__(self, hashed: NDArray[np.uint64], numbers: NDArray[np.int32]):
        order = np.argsort(hashed, kind="stable")
        self._hashes, self._numbers = hashed[order], numbers[order]

    def first(self, hashed: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The first number of each hash, -1 where there is none."""
        if not len(self._hashes):
            return np.full(len(hashed), -1, np.int64)
        places = np.minimum(np.searchsorted(self._hashes, hashed), len(self._hashes) - 1)
        return np.where(self._hashes[places] == hashed, self._numbers[places], -1).astype(np.int64)

    def every(self, hashed: np.uint64) -> list[int]:
        """All numbers of one hash."""
        low, high = (self._hashes.searchsorted(hashed, side) for side in ("left", "right"))
        return self._numbers[low:high].tolist()


class Ids(Sequence[str]):
    """Image ids in their order, each of them once. A slice is another Ids."""

    def __init__(self, ids: Iterable[str] | pa.Array | pa.ChunkedArray):
        if isinstance(ids, pa.ChunkedArray):
            self.texts = ids
        else:
            one = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
            self.texts = pa.chunked_array([one], pa.string())

    def __len__(self) -> int:
        return len(self.texts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and self.texts.equals(other.texts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Ids, (self.texts.to_pylist(),)  # Arrow would send the whole that a slice is of

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Ids(self.texts[index])
        return self.texts[int(index)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.texts.chunks:
            for start in range(0, len(chunk), AT_ONCE):
                yield from chunk[start : start + AT_ONCE].to_pylist()

    def position(self, image_id: str) -> int:
        """The position of an id, -1 where it is not among these."""
        numbers = self._index.every(hashes([image_id])[0])
        return next((number for number in numbers if self[number] == image_id), -1)

    def positions(self, ids: "Ids") -> NDArray[np.int64]:
        """The position of each of `ids`, -1 where it is not among these."""
        found = self._index.first(hashes(ids))
        there = np.flatnonzero(found >= 0)
        for places in np.array_split(there, -(-len(there) // AT_ONCE) or 1):
            same = pc.equal(self._take(found[places]), ids._take(places))
            for at in places[~np.asarray(same, dtype=bool)]:  # another id has this hash
                found[at] = self.position(ids[int(at)])
        return found

    def _take(self, positions: NDArray[np.int64]) -> pa.Array:
        """The ids at these positions. Arrow's own `take` would first copy all chunks into one."""
        order = np.argsort(positions, kind="stable")
        edges = np.searchsorted(positions[order], self._starts)
        parts = [
            chunk.take(pa.array(positions[order[low:high]] - start))
            for chunk, start, low, high in zip(
                self.texts.chunks, self._starts, edges, edges[1:], strict=False
            )
            if low < high
        ]
        taken = pa.concat_arrays(parts) if parts else pa.array([], pa.string())
        return taken.take(pa.array(np.argsort(order, kind="stable")))

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The position of each chunk's first id, and the number of ids."""
        return np.cumsum([0, *map(len, self.texts.chunks)])

    @cached_property
    def _index(self) -> Index:
        return Index(hashes(self), np.arange(len(self), dtype=np.int32))


class Labels(Mapping[str, int]):
    """Class ids by image id, as a dictionary would have them. Other processes get a dictionary."""

    def __init__(self, ids: Ids, class_ids: Sequence[int] | NDArray[np.integer]):
        self._ids, self._class_ids = ids, np.asarray(class_ids, np.int32)

    def __getitem__(self, image_id: str) -> int:
        position = self._ids.position(image_id)
        if position < 0:
            raise KeyError(image_id)
        return int(self._class_ids[position])

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(zip(self._ids, self._class_ids.tolist(), strict=True)),)


def hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each text."""
    count = len(texts) if isinstance(texts, Sized) else -1
    return np.fromiter((xxhash.xxh3_64_intdigest(t.encode()) for t in texts), np.uint64, count)
