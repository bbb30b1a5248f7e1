"""Reads the split table: which image is train, val or test, and which class is base or novel."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.runtime.errors import StageError
from tasks.tables import shards


def select(split: Path, part: str, groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the split table in one part and some groups, by ascending image id.

    Raises StageError when there are none.
    """
    return select_parts(split, dict.fromkeys(groups, part))


def select_parts(split: Path, parts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the split table in the part that `parts` has for their group, by ascending image id.

    Raises StageError when there are none, also where groups have parts of their own and one has none.
    """
    rows, there = _rows(split, parts)
    lacking = [g for g in parts if g in there and not any(row["group"] == g for row in rows)]
    if not rows or (lacking and len(set(parts.values())) > 1):
        groups = lacking or list(parts)
        part = " or ".join(dict.fromkeys(parts[group] for group in groups))
        raise StageError(f"{split} holds no {part} image of {' or '.join(groups)} classes")
    return rows


def unlabelled(split: Path, groups: Sequence[str], part: str) -> list[dict[str, Any]]:
    """The images that training without labels sees, by ascending image id: id and group alone.

    `part` is train or test. Train images of novel classes stand in the split as `unused`.
    Raises StageError where one of `groups` has no such images.
    """
    parts = dict.fromkeys(groups, part)
    if part == "train" and "novel" in parts:
        parts["novel"] = "unused"
    rows, there = _rows(split, parts)
    if lacking := [group for group in groups if all(row["group"] != group for row in rows)]:
        raise StageError(
            f"[BuildMCQ] unlabelled_groups = {' '.join(groups)}: {split} holds no {part} images of "
            f"{lacking[0]} classes; {_remedy(lacking[0], there, part)}"
        )
    return [{name: row[name] for name in ("image_id", "group")} for row in rows]


def _rows(split: Path, parts: Mapping[str, str]) -> tuple[list[dict[str, Any]], set[str]]:
    """Rows in the part that `parts` has for their group, by ascending image id, and all groups there are."""
    rows, there = [], set()
    first: dict[str, str] = {}  # equal strings are one object, of which a million rows have few
    for row in shards.iter_rows(split, "split", batch_size=10_000):
        there.add(row["group"])
        if row["split"] == parts.get(row["group"]):
            names = {name: row[name] for name in ("class_name", "group", "split")}
            rows.append(row | {name: first.setdefault(text, text) for name, text in names.items()})
    return sorted(rows, key=lambda row: row["image_id"]), there


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
