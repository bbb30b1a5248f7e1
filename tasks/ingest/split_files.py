"""Applies published split files exactly: CoOp's, and those of the published DiVE-k code.

CoOp (https://github.com/KaiyangZhou/CoOp): one `split_zhou_*.json` that maps train, val and test to
lists of [path, label, class name]. DiVE-k (https://github.com/raja-kumar/DiVE-k): a folder such as
`data/CUB_200_2011/zero_shot` whose `*_train.json` and `*_val.json` list {image_path, problem,
solution}. The published evaluation reads the val files, so where there is no test file they are
the test images.
"""

import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_cards import Card
from tasks.ingest.split_draws import FileOrder
from tasks.ingest.split_images import Images
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError

PARTS = ("train", "val", "test")


class Listed(NamedTuple):
    """One image of a split file. `label` is the file's own for the class: a number, or the name."""

    path: str
    part: str
    class_name: str
    label: int | str


def follow(images: Images, path: Path, card: Card, rejected: Sequence[str] = ()) -> FileOrder:
    """Give every image the split that the file or folder `path` lists for it; others are unused.

    Returns all listed images in the file's order, the unusable ones included.

    A listed path means the image whose own path shares the longest end with it. Listed images among
    the `rejected` paths are counted and reported. Raises StageError when the file cannot be read, or
    when it lists a missing image, one image twice, or an image under another class.
    """
    setting = f"[Split] split_file = {path}"
    listed = read(path)
    wanted = {tail for item in listed for tail in _tails(item.path)}
    ids = (image_id for rows in images.blocks() for image_id in images.ids.take(rows).tolist())
    ends, unusable = _by_end(ids, wanted), _by_end(rejected, wanted)
    lost: list[str] = []
    names = ClassNames(card.classes, card.aliases)
    placed: dict[int, Listed] = {}
    absent: list[str] = []
    rows = np.full(len(listed), -1, np.int64)
    for place, item in enumerate(listed):
        tail = next((tail for tail in _tails(item.path) if tail in ends or tail in unusable), "")
        if tail not in ends:
            (lost if tail else absent).append(item.path)
            continue
        index, *others = ends[tail]
        if others:
            first, second = images.ids.take(np.array([index, *others])).tolist()
            raise StageError(f"{setting}: {item.path!r} fits {first} and {second}")
        if index in placed:
            raise StageError(
                f"{setting} names {_id(images, index)} twice: {placed[index].path!r}, {item.path!r}"
            )
        class_id = names.match(item.class_name).class_id
        if class_id is not None and class_id != images.labels[index]:
            raise StageError(
                f"{setting} says that {_id(images, index)} is {item.class_name!r}; card {card.name} has "
                f"it as {card.classes[images.labels[index]]!r}"
            )
        placed[index] = item
        rows[place] = index
    if absent:
        raise StageError(
            f"{setting} names {len(absent)} images that card {card.name} does not have, {absent[0]!r} first"
        )
    if lost:
        print(f"split: {len(lost)} of the listed images are unusable: {', '.join(lost[:5])}")
    codes: dict[int | str, int] = {}
    labels = np.array([codes.setdefault(item.label, len(codes)) for item in listed], np.int32)
    parts = np.array([images.parts.index(item.part) for item in listed], np.int16)
    images.official[:] = images.parts.index("unused")
    images.official[rows[rows >= 0]] = parts[rows >= 0]
    return FileOrder(rows, labels, parts)


def _id(images: Images, index: int) -> str:
    return images.ids.take(np.array([index]))[0].as_py()


def sources(path: Path) -> list[Path]:
    """The files that make up a split; their content identifies it."""
    return sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []


def read(path: Path) -> list[Listed]:
    """The images of a split file or folder, in its order."""
    try:
        if path.is_dir():
            return _dive_k(path)
        parts = json.loads(path.read_text(encoding="utf-8-sig"))
        return [
            Listed(str(image), part, str(name), label)
            for part in PARTS
            for image, label, name in parts[part]
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StageError(
            f"[Split] split_file = {path} is no split file of CoOp's and no folder of DiVE-k's "
            f"({type(error).__name__}: {error})"
        ) from error


def _dive_k(folder: Path) -> list[Listed]:
    """The images that a folder of the published DiVE-k code lists."""
    files = {part: sorted(folder.glob(f"*_{part}.json")) for part in PARTS}
    if not files["train"] or not files["val"] + files["test"]:
        raise ValueError("it needs *_train.json and *_val.json")
    split_of = {"train": "train", "val": "val" if files["test"] else "test", "test": "test"}
    listed = []
    for part, paths in files.items():
        for file in paths:
            for item in json.loads(file.read_text(encoding="utf-8-sig")):
                name = item["solution"].removeprefix("<answer>").removesuffix("</answer>")
                listed.append(Listed(item["image_path"], split_of[part], name, name))
    return listed


def _by_end(paths: Iterable[str], wanted: Container[str]) -> dict[str, list[int]]:
    """Wanted path end -> the indices of the paths that have it, at most two."""
    ends: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        for tail in _tails(path):
            if tail in wanted and len(fitting := ends.setdefault(tail, [])) < 2:
                fitting.append(index)
    return ends


def _tails(path: str) -> list[str]:
    """The ends of `a/b/c.jpg`: itself, `b/c.jpg` and `c.jpg`."""
    pieces = path.split("/")
    return ["/".join(pieces[start:]) for start in range(len(pieces))]
