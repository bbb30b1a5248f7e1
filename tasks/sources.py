"""Where a card's images come from: drawn, a folder, official archives, or the hub.

Every source becomes a list of Items: where the image lies, its class id, its official split, and a
function that gives its bytes when it is wanted, so that a million images cost no memory.
"""

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_cards import Card, beetles
from tasks import archives as archive_files
from tasks import layouts
from tasks.labels import ClassNames
from tasks.run import StageError

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


def list_items(card: Card, archives: Path, workplace: Path) -> list[Item]:
    """Every image the card's source holds, in an order that depends on names alone.

    `archives` and `workplace` are for official archives: where they lie, where to unpack them.
    """
    if card.source["kind"] == "archive":
        items = _archive(card, archives, workplace)
    else:
        items = {"drawn": _drawn, "folder": _folder, "hub": _hub}[card.source["kind"]](card)
    counts = Counter(item.label for item in items)
    if empty := [name for label, name in enumerate(card.classes) if not counts[label]]:
        raise StageError(
            f"card {card.name}: no image of {len(empty)} of {len(card.classes)} classes "
            f"({', '.join(empty[:5])}); correct `classes` or `source` in the card"
        )
    return items


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


def _table(card: Card, table: Path) -> list[Item]:
    """A CSV or Parquet file with the columns path, class and, optionally, split."""
    import pandas as pd

    try:
        frame = (pd.read_csv if table.suffix == ".csv" else pd.read_parquet)(table)
    except Exception as error:  # pandas and pyarrow raise a dozen kinds
        raise StageError(f"{table} cannot be read: {str(error).splitlines()[0]}") from error
    if missing := [column for column in ("path", "class") if column not in frame]:
        raise StageError(
            f"{table} has no column {missing[0]!r}; it has {', '.join(map(str, frame.columns))}"
        )
    known = ClassNames(card.classes, card.aliases)
    splits = frame["split"].fillna("") if "split" in frame else [""] * len(frame)
    items, seen = [], set()
    rows = zip(frame["path"].astype(str), frame["class"].astype(str), splits, strict=True)
    for number, (path, name, part) in enumerate(rows, start=1):
        class_id = known.match(name).class_id
        if class_id is None:
            raise StageError(f"{table}, row {number}: no class {name!r} in card {card.name}")
        if part and part not in SPLIT_FOLDERS:
            allowed = ", ".join(SPLIT_FOLDERS)
            raise StageError(f"{table}, row {number}: split {part!r} is none of {allowed}")
        if path in seen:
            raise StageError(f"{table}, row {number}: {path} comes twice")
        seen.add(path)
        load = partial(_listed, table.parent / path)
        items.append(Item(path, class_id, SPLIT_FOLDERS.get(part, ""), load))
    return items


def _listed(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Reject("listed, but there is no such file") from error


def _hub(card: Card) -> list[Item]:
    """A dataset of the Hugging Face hub, or a local folder in its layout, at a pinned revision."""
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    source = card.source
    image, label = source.get("image", "image"), source.get("label", "label")
    known = ClassNames(card.classes, card.aliases)
    items: list[Item] = []
    for name, official in (source.get("splits") or {"train": "train", "test": "test"}).items():
        try:
            table = load_dataset(
                os.path.expanduser(source["repo"]),
                source.get("config"),
                revision=source.get("revision"),
                split=name,
            )
        except Exception as error:  # of the network, the hub, or the files themselves
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise StageError(
                f"card {card.name}: split {name!r} of {source['repo']} cannot be loaded: {reason}"
            ) from error
        for column in (image, label):
            if column not in table.column_names:
                raise StageError(
                    f"card {card.name}: {source['repo']} has no column {column!r}; it has "
                    f"{', '.join(table.column_names)} (source.image and source.label in the card)"
                )
        names = getattr(table.features[label], "names", None)
        table = table.cast_column(image, ImageColumn(decode=False))
        labels: dict[Any, int] = {}
        for index, value in enumerate(table[label]):
            if value not in labels:
                text = names[value] if names and isinstance(value, int) else str(value)
                class_id = known.match(text).class_id
                if class_id is None:
                    raise StageError(
                        f"card {card.name}: {source['repo']} has the class {text!r}, which is "
                        "neither a class of the card nor an alias"
                    )
                labels[value] = class_id
            path = f"{name}/{index:07d}"
            items.append(Item(path, labels[value], official, partial(_row, table, index, image)))
    return items


def _row(table: Any, index: int, column: str) -> bytes:
    value = table[index][column] or {}
    if value.get("bytes"):
        return value["bytes"]
    return _listed(Path(value.get("path") or "nowhere"))


def _folder(card: Card) -> list[Item]:
    """`class_name/file`, `train/class_name/file` and `test/class_name/file`, or a table of paths."""
    root = Path(os.path.expanduser(str(card.source.get("path", ""))))
    if root.suffix in (".csv", ".parquet") and root.is_file():
        return _table(card, root)
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
