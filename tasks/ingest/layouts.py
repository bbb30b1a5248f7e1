"""Reads the file lists of the five benchmark archives: each image's path, class and split.

Each reader takes the folder in which the official archives were unpacked, and returns an Entry for
each image, in the order of the archive's own lists. Labels count from 0 by ascending official class
id, which is the order of the card's `classes`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.runtime.errors import StageError


class Entry(NamedTuple):
    """One image: `path` below the unpacked folder, class id from 0, split (train, val or test)."""

    path: str
    label: int
    split: str


def cub(root: Path, classes: Sequence[str]) -> list[Entry]:
    """CUB-200-2011: three lists keyed by image id; class ids count from 1."""
    top = root / "CUB_200_2011"
    labels = dict(_pairs(top / "image_class_labels.txt"))
    train = dict(_pairs(top / "train_test_split.txt"))
    return [
        Entry(f"CUB_200_2011/images/{path}", int(labels[i]) - 1, _split(train[i] == "1"))
        for i, path in _pairs(top / "images.txt")
    ]


def flowers(root: Path, classes: Sequence[str]) -> list[Entry]:
    """Oxford Flowers-102: labels and image ids in .mat files, both from 1; train, val and test."""
    labels = _mat(root / "imagelabels.mat")["labels"].ravel()
    sets = _mat(root / "setid.mat")
    keys = {"trnid": "train", "valid": "val", "tstid": "test"}
    split = {int(i): name for key, name in keys.items() for i in sets[key].ravel()}
    return [
        Entry(f"jpg/image_{i:05d}.jpg", int(label) - 1, split[i])
        for i, label in enumerate(labels, start=1)
    ]


def pets(root: Path, classes: Sequence[str]) -> list[Entry]:
    """Oxford-IIIT Pet: `name class species breed` a line; the folder's other files are ignored."""
    return [
        Entry(f"images/{fields[0]}.jpg", int(fields[1]) - 1, split)
        for name, split in (("trainval", "train"), ("test", "test"))
        for fields in _fields(root / "annotations" / f"{name}.txt")
    ]


def cars(root: Path, classes: Sequence[str]) -> list[Entry]:
    """Stanford Cars: MATLAB structs with `class` from 1 and `fname`; test labels have their own file."""
    devkit = next((p for p in (root / "devkit", root / "car_devkit/devkit") if p.is_dir()), root)
    lists = (
        (devkit / "cars_train_annos.mat", "train"),
        (root / "cars_test_annos_withlabels.mat", "test"),
    )
    return [
        Entry(f"cars_{split}/{_only(row['fname'])}", int(_only(row["class"])) - 1, split)
        for path, split in lists
        for row in _mat(path)["annotations"].ravel()
    ]


def aircraft(root: Path, classes: Sequence[str]) -> list[Entry]:
    """FGVC-Aircraft 2013b: `image variant name` a line; names may hold spaces and slashes."""
    data = root / "fgvc-aircraft-2013b" / "data"
    labels = {name: label for label, name in enumerate(classes)}
    entries = []
    for split in ("train", "val", "test"):
        path = data / f"images_variant_{split}.txt"
        for image, name in _pairs(path):
            if name not in labels:
                raise StageError(f"{path}: the card has no class {name!r}")
            relative = f"fgvc-aircraft-2013b/data/images/{image}.jpg"
            entries.append(Entry(relative, labels[name], split))
    return entries


LAYOUTS: dict[str, Callable[[Path, Sequence[str]], list[Entry]]] = {
    "cub": cub,
    "flowers": flowers,
    "pets": pets,
    "cars": cars,
    "aircraft": aircraft,
}


def entries(layout: str, root: Path, classes: Sequence[str]) -> list[Entry]:
    """Every image of an unpacked archive.

    Raises StageError when a list is missing, when the lists contradict one another, or when they
    name a class that the card does not have.
    """
    try:
        listed = LAYOUTS[layout](root, classes)
    except FileNotFoundError as error:
        raise StageError(
            f"{error.filename} is missing: the archives do not have the layout {layout!r}"
        ) from error
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise StageError(
            f"{root}: the lists of layout {layout!r} do not fit together "
            f"({type(error).__name__}: {error})"
        ) from error
    if odd := next((e for e in listed if not 0 <= e.label < len(classes)), None):
        raise StageError(
            f"{odd.path} is of class {odd.label + 1}, but the card lists {len(classes)} classes"
        )
    return listed


def _split(train: bool) -> str:
    return "train" if train else "test"


def _fields(path: Path) -> list[list[str]]:
    """The words of every line that is neither empty nor a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line.strip() and not line.startswith("#")]


def _pairs(path: Path) -> list[tuple[str, str]]:
    """(first word, rest) of every line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cut = [line.strip().split(maxsplit=1) for line in lines if line.strip()]
    return [(first, rest) for first, rest in cut]


def _mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    with path.open("rb") as file:
        return loadmat(file)


def _only(value: Any) -> Any:
    """The one value inside MATLAB's nested 1 x 1 arrays."""
    while isinstance(value, np.ndarray):
        value = value.ravel()[0]
    return value
