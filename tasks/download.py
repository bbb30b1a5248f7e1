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
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data_cards import Card, beetles, load
from tasks import archives as archive_files
from tasks import layouts, schemas, shards
from tasks.labels import ClassNames
from tasks.run import StageError, main, progress

IMAGES_PER_SHARD = 1000
UNPACKED = "unpacked"  # below the output; gone when the stage has ended
SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Item:
    """One image to ingest: `load` gives its bytes; `official_split` is empty where none is given."""

    path: str
    label: int
    official_split: str
    load: Callable[[], bytes]
    crop_bottom: int = 0  # pixels of a banner that is not part of the picture


class Reject(Exception):
    """A file that is not a usable image; the message is the reason recorded for it."""


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


def list_items(card: Card, archives: Path, workplace: Path) -> list[Item]:
    """Every image the card's source holds, in an order that depends on names alone.

    `archives` and `workplace` are for official archives: where they lie, where to unpack them.
    """
    if card.source["kind"] == "archive":
        items = _archive(card, archives, workplace)
    else:
        items = {"drawn": _drawn, "folder": _folder}[card.source["kind"]](card)
    counts = Counter(item.label for item in items)
    if empty := [name for label, name in enumerate(card.classes) if not counts[label]]:
        raise StageError(
            f"card {card.name}: no image of {len(empty)} of {len(card.classes)} classes "
            f"({', '.join(empty[:5])}); correct `classes` or `source` in the card"
        )
    return items


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


def _drawn(card: Card) -> list[Item]:
    seed, per_class = card.source["seed"], card.source["images_per_class"]

    def draw(label: int, index: int, split: str) -> bytes:
        buffer = io.BytesIO()
        beetles.draw(label, index, seed, split).save(buffer, "PNG")
        return buffer.getvalue()

    return [
        Item(
            path=f"{split}/{name}/{index:04d}.png",
            label=label,
            official_split=split,
            load=partial(draw, label, index, split),
        )
        for split, count in per_class.items()
        for label, name in enumerate(card.classes)
        for index in range(count)
    ]


def _archive(card: Card, archives: Path, workplace: Path) -> list[Item]:
    """The images of official archives, unpacked into `workplace`."""
    found = archive_files.fetch(card.source["files"], archives, card.name)
    root = archive_files.unpacked(found, workplace, report=lambda text: print(f"download: {text}"))
    crop = int(card.source.get("crop_bottom", 0))
    return [
        Item(entry.path, entry.label, entry.split, partial(_listed, root / entry.path), crop)
        for entry in layouts.entries(card.source["layout"], root, card.classes)
    ]


def _listed(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Reject("listed in the archive but not in it") from error


def _folder(card: Card) -> list[Item]:
    """`class_name/file`, or `train/class_name/file` and `test/class_name/file`."""
    root = Path(os.path.expanduser(str(card.source.get("path", ""))))
    if not root.is_dir():
        raise StageError(f"card {card.name}: source.path {root} is not a folder")
    labels = {name: label for label, name in enumerate(card.classes)}
    labels |= {folder: labels[name] for folder, name in (card.source.get("folders") or {}).items()}
    tops = sorted(path for path in root.iterdir() if path.is_dir() and not _hidden(path))
    if any(path.name in SPLIT_FOLDERS for path in tops):
        places = [(SPLIT_FOLDERS.get(top.name, ""), top) for top in tops]
        if stray := [top.name for split, top in places if not split]:
            raise StageError(f"{root}: {stray[0]} stands beside train/ and test/; move it away")
        folders = [
            (split, path)
            for split, top in places
            for path in sorted(top.iterdir())
            if path.is_dir() and not _hidden(path)
        ]
    else:
        folders = [("", path) for path in tops]
    items = []
    for split, folder in folders:
        if folder.name not in labels:
            raise StageError(
                f"{folder}: no class {folder.name!r} in card {card.name}; add it to `classes`, or "
                f"map it under source.folders"
            )
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not _hidden(path):
                relative = path.relative_to(root).as_posix()
                items.append(Item(relative, labels[folder.name], split, path.read_bytes))
    if not items:
        raise StageError(f"card {card.name}: {root} holds no files in class folders")
    return items


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


if __name__ == "__main__":
    main(download)
