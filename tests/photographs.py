"""Pictures with the sizes of real ones, drawn: smooth noise and shapes, as JPEG."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tasks.tables import schemas, shards

TWELVE_MP = (4000, 3000)
THUMBNAIL = (32, 32)


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG of that size."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.random(3) * (width, height, min(width, height) / 4)
        colour = tuple(int(value) for value in rng.integers(0, 255, 3))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    made = io.BytesIO()
    image.save(made, "JPEG", quality=90)
    return made.getvalue()


def replaced(
    download: Path, output: Path, names: list[str], chosen: Callable[[int, str, bytes], bytes]
) -> None:
    """Download's table anew in `output`: `chosen` makes encoded bytes of (number, image id, bytes)."""
    rows = shards.read(download, "images").to_pylist()
    for number, row in enumerate(rows):
        data = chosen(number, row["image_id"], row["image"]["bytes"])
        with Image.open(io.BytesIO(data)) as image:
            row |= {"width": image.width, "height": image.height}
        row["image"] = {"bytes": data, "path": None}
    shards.write(shards.shard_path(output, "images", 0), rows, schemas.images(names))
