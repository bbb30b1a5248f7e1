"""Download: a data card's images, checked and decoded, into Parquet.

    python -m tasks.download CONFIG.json

Writes `images-*.parquet` (one row an image), `rejects.parquet` (one row a file that could not be
used, with the reason; no file when there is none) and the counts in `stats.json`. Bytes are kept
as they came where every consumer reads them alike, an upright RGB JPEG or PNG; anything else is
stored as a PNG of what a person sees: rotated by EXIF, alpha on white, 8-bit RGB, first frame.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_cards import load
from tasks import schemas, shards
from tasks.labels import ClassNames
from tasks.run import StageError, main, progress
from tasks.sources import Item, Reject, list_items

IMAGES_PER_SHARD = 1000
UNPACKED = "unpacked"  # below the output; gone when the stage has ended


def download(
    output: Path, *, card: str, max_reject_share: float, archives: Path = Path("archives")
) -> None:
    """Put every image of the card into Parquet shards, and every unusable file into the rejects.

    `archives` is the folder of official archives: what is missing there is downloaded into it.
    Raises StageError when the source is missing or empty, or when the share of rejected files
    exceeds `max_reject_share`.
    """
    data_card = load(card)
    try:
        ClassNames(data_card.classes, data_card.aliases)
    except ValueError as error:
        raise StageError(f"card {card}: {error}") from error
    items = list_items(data_card, archives, output / UNPACKED)
    schema = schemas.images(data_card.classes)
    rejects: list[dict[str, str]] = []
    parts = list(shards.chunks(items, IMAGES_PER_SHARD))
    with progress(None, desc="download", total=len(items), unit="images") as bar:
        for index, part in enumerate(parts):
            image_path = shards.shard_path(output, "images", index)
            reject_path = shards.shard_path(output, "part-rejects", index)
            if image_path.exists():  # written after its rejects
                bar.update(len(part))
            else:
                rows, bad = ingest(part, data_card.name, bar.update)
                shards.write(reject_path, bad, schemas.rejects())
                shards.write(image_path, rows, schema)
            if reject_path.exists():
                rejects += shards.read_file(reject_path).to_pylist()
    share = len(rejects) / len(items)
    if share > max_reject_share:
        worst = "; ".join(f"{row['path']}: {row['reason']}" for row in rejects[:10])
        raise StageError(
            f"{len(rejects)} of {len(items)} files are unusable ({share:.1%}, more than [Download] "
            f"max_reject_share = {max_reject_share:g}): {worst}"
        )
    shards.write(output / "rejects.parquet", rejects, schemas.rejects())
    for path in output.glob("part-rejects-*.parquet"):
        path.unlink()
    shutil.rmtree(output / UNPACKED, ignore_errors=True)
    stats = {"images": len(items) - len(rejects), "rejected": len(rejects)}
    (output / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


def ingest(
    items: list[Item], card: str, advance: Callable[[int], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows for the images that can be used, and rows for the files that cannot."""
    rows, rejects = [], []
    for item in items:
        try:
            data, width, height = normalise_image(item.load(), item.crop_bottom)
        except Reject as reason:
            rejects.append({"path": item.path, "reason": str(reason)})
        else:
            image_id = f"{card}/{item.path}"
            rows.append(
                {
                    "image_id": image_id,
                    "image": {"bytes": data, "path": item.path},
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "width": width,
                    "height": height,
                    "label": item.label,
                    "official_split": item.official_split,
                }
            )
        advance(1)
    return rows, rejects


def normalise_image(data: bytes, crop_bottom: int = 0) -> tuple[bytes, int, int]:
    """Bytes that every decoder reads as the same upright 8-bit RGB picture, with width and height.

    The lowest `crop_bottom` pixel rows are cut off.

    Raises Reject with the reason when the bytes are no picture, or a truncated one.
    """
    if not data:
        raise Reject("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            upright = image.getexif().get(0x0112, 1) == 1
            plain = image.format in ("JPEG", "PNG") and getattr(image, "n_frames", 1) == 1
            as_is = image.mode == "RGB" and upright and plain and "transparency" not in image.info
            if as_is and not crop_bottom:
                return data, image.width, image.height
            rgb = _to_rgb(ImageOps.exif_transpose(image))
            if rgb.height <= crop_bottom:
                raise Reject(f"only {rgb.height} pixels high, banner included")
            rgb = rgb.crop((0, 0, rgb.width, rgb.height - crop_bottom))
    except Image.DecompressionBombError as error:
        raise Reject("too many pixels (decompression bomb)") from error
    except Reject:
        raise
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise Reject(f"{type(error).__name__}: {error}"[:200]) from error
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG")
    return buffer.getvalue(), rgb.width, rgb.height


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grayscale: PIL's own conversion would clip everything above 255 to white.
        highest = image.getextrema()[1]
        scale = 255 / highest if highest > 255 else 1
        return image.convert("F").point(lambda value: value * scale).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


if __name__ == "__main__":
    main(download)
