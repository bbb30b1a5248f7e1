"""Reads the split table: which image is train, val or test, and which class is base or novel."""

import math
from collections.abc import Mapping
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
    table = shards.read(split, "split").to_pylist()
    rows = [row for row in table if row["split"] == parts.get(row["group"])]
    there = {row["group"] for row in table}
    lacking = [g for g in parts if g in there and not any(row["group"] == g for row in rows)]
    if not rows or (lacking and len(set(parts.values())) > 1):
        groups = lacking or list(parts)
        part = " or ".join(dict.fromkeys(parts[group] for group in groups))
        raise StageError(f"{split} holds no {part} image of {' or '.join(groups)} classes")
    return sorted(rows, key=lambda row: row["image_id"])


def base_count(num_classes: int, protocol: str) -> int:
    """How many classes are base: the first ones by ascending class id."""
    return math.ceil(num_classes / 2) if protocol == "base_to_novel" else num_classes
