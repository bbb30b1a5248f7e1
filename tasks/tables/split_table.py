"""Reads the split table: which image is train, val or test, and which class is base or novel."""

import math
from pathlib import Path
from typing import Any

from tasks.runtime.errors import StageError
from tasks.tables import shards


def select(split: Path, part: str, groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the split table in one part and some groups, by ascending image id.

    Raises StageError when there are none.
    """
    rows = [
        row
        for row in shards.read(split, "split").to_pylist()
        if row["split"] == part and row["group"] in groups
    ]
    if not rows:
        raise StageError(f"{split} holds no {part} image of {' or '.join(groups)} classes")
    return sorted(rows, key=lambda row: row["image_id"])


def base_count(num_classes: int, protocol: str) -> int:
    """How many classes are base: the first ones by ascending class id."""
    return math.ceil(num_classes / 2) if protocol == "base_to_novel" else num_classes
