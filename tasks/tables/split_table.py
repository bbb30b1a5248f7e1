"""Reads the split table: which image is train, val or test, and which class is base or novel."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.ids import AT_ONCE, Ids, Labels

Row = dict[str, Any]


class Rows(Sequence[Row]):
    """Rows of the split table by ascending image id, in Arrow's memory: some sixty bytes each.

    A row is a dictionary. A slice is another Rows.
    """

    def __init__(self, table: pa.Table):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Rows(self._table.slice(start, max(0, stop - start)))
        return self._table.slice(index if index >= 0 else len(self) + index, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Row]:
        for batch in self._table.to_batches(AT_ONCE):
            yield from batch.to_pylist()

    @cached_property
    def ids(self) -> Ids:
        """The image ids."""
        return Ids(self._table["image_id"])

    @property
    def labels(self) -> Labels:
        """Class ids by image; -1 where an image has no label."""
        return Labels(self.ids, self._labels)

    @property
    def classes(self) -> list[int]:
        """The class ids that occur, ascending."""
        return [label for label in np.unique(self._labels).tolist() if label >= 0]

    def labelled(self) -> "Rows":
        """The rows that have a label."""
        return Rows(self._table.filter(pa.array(self._labels >= 0)))

    def without(self, image_ids: Collection[str]) -> "Rows":
        """The rows of all images but these."""
        if not image_ids:
            return self
        return Rows(
            self._table.filter(pc.invert(pc.is_in(self._table["image_id"], pa.array(image_ids))))
        )

    @property
    def _labels(self) -> np.ndarray:
        return np.asarray(pc.fill_null(self._table["label"].cast(pa.int32()), -1))


def select(split: Path, part: str, groups: tuple[str, ...]) -> Rows:
    """Rows of the split table in one part and some groups, by ascending image id.

    Raises StageError when there are none.
    """
    return select_parts(split, dict.fromkeys(groups, part))


def select_parts(split: Path, parts: Mapping[str, str]) -> Rows:
    """Rows of the split table in the part that `parts` has for their group, by ascending image id.

    Raises StageError when there are none, also where groups have parts of their own and one has none.
    """
    table, there = _read(split, parts)
    found = set(table["group"].unique().to_pylist())
    lacking = [group for group in parts if group in there - found]
    if not table.num_rows or (lacking and len(set(parts.values())) > 1):
        groups = lacking or list(parts)
        part = " or ".join(dict.fromkeys(parts[group] for group in groups))
        raise StageError(f"{split} holds no {part} image of {' or '.join(groups)} classes")
    return Rows(table)


def unlabelled(split: Path, groups: Sequence[str], part: str) -> Rows:
    """The images that training without labels sees, by ascending image id: id and group alone.

    `part` is train or test. Train images of novel classes stand in the split as `unused`.
    Raises StageError where one of `groups` has no such images.
    """
    parts = dict.fromkeys(groups, part)
    if part == "train" and "novel" in parts:
        parts["novel"] = "unused"
    table, there = _read(split, parts)
    found = table["group"].unique().to_pylist()
    if lacking := [group for group in groups if group not in found]:
        raise StageError(
            f"[BuildMCQ] unlabelled_groups = {' '.join(groups)}: {split} holds no {part} images of "
            f"{lacking[0]} classes; {_remedy(lacking[0], there, part)}"
        )
    return Rows(table.select(["image_id", "group"]))


def _read(split: Path, parts: Mapping[str, str]) -> tuple[pa.Table, set[str]]:
    """Rows in the part that `parts` has for their group, by ascending image id, and all groups there are."""
    kept, there = [], set()
    for path in shards.paths(split, "split"):
        for batch in shards.iter_batches(path, None, 1 << 16):
            # A million rows have few names: each is held once.
            table = pa.Table.from_batches([batch])
            for name in ("class_name", "group", "split"):
                column = table[name].dictionary_encode()
                table = table.set_column(table.column_names.index(name), name, column)
            there |= set(table["group"].unique().to_pylist())
            wanted = pa.array([parts.get(group, "") for group in table["group"].to_pylist()])
            kept.append(table.filter(pc.equal(table["split"].cast(pa.string()), wanted)))
    rows = pa.concat_tables(kept).unify_dictionaries()
    ids = rows["image_id"]
    if not pc.all(pc.less(ids[:-1], ids[1:])).as_py():
        rows = rows.take(pc.sort_indices(ids))
    return rows, there


def _remedy(group: str, there: set[str], part: str) -> str:
    """What to do where a split has no images of a group for training without labels."""
    if group not in there:
        return "with [Split] protocol = all every class is base: leave novel out"
    if part == "test":
        return "leave that group out"
    return (
        "its source puts them into val and test alone: leave that group out, use a source or a "
        "[Split] split_file with train images of these classes, or set unlabelled_part = test, which "
        "the report then points out"
    )


def groups(split: Path) -> dict[str, str]:
    """Image id -> base or novel."""
    rows = shards.read(split, "split", ["image_id", "group"]).to_pylist()
    return {row["image_id"]: row["group"] for row in rows}


def base_count(num_classes: int, protocol: str) -> int:
    """How many classes are base: the first ones by ascending class id."""
    return math.ceil(num_classes / 2) if protocol == "base_to_novel" else num_classes
