"""Drafts a data card from a folder of photographs: `make card NAME=my_birds FOLDER=~/photos/birds`.

The folder holds `class_name/*.jpg`, or the same under `train/`, `val/` and `test/`. Class names come
from the folders, with underscores read as spaces. A leading number such as "001." is dropped where
it is an index of the folders. Every file is opened.
The card lists each class's image count, the image sizes, the files that are no images, and the
pictures that occur in two classes or two splits.
"""

import argparse
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from data_cards import FOLDER, clean_name
from tasks.ingest import folders
from tasks.ingest.duplicates import twins
from tasks.ingest.pictures import Picture, Reject, open_picture
from tasks.ingest.sources import reader
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress
from tasks.runtime.protocol import METHOD_NAMES
from tasks.tables.durable import write_text

NEAR = 6  # bits of 64 in which the difference hashes of near duplicates differ at most
SMALL = 32  # pixels; with a shorter side lookalikes can hardly be distinguished
INDEX = re.compile(r"(\d+)[._ -]+(.+)")  # of a class folder: "001.Black footed Albatross"
SHOWN = 20  # findings of a kind that the card lists at most


@dataclass(frozen=True)
class Seen:
    """One file: its path below the folder, its class and split, and its picture or Reject."""

    path: str
    name: str
    split: str
    picture: Picture | Reject


def draft(name: str, folder: Path, noun: str, kind: str) -> str:
    """The text of a card for `folder`.

    Raises StageError for a method's name, when there are no class folders, when two of them give the
    same class name, or when a class has no usable image.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise StageError(f"NAME {name!r} must be lower-case letters, digits and underscores")
    if name in METHOD_NAMES:
        raise StageError(
            f"NAME {name!r} is a method's, so that [Train:{name}] in luigi.cfg would mean both; choose another"
        )
    if not folder.is_dir():
        raise StageError(f"{folder} is not a folder")
    if folders.relative(folder.resolve(), Path("/")) != str(folder.resolve())[1:]:
        raise StageError(f"the path {str(folder)!a} is not UTF-8; rename the folder")
    tops = folders.class_folders(folder)
    names = class_names(folder, sorted({path.name for _, path in tops}))
    left_out = folders.outside(folder, tops)
    files = [
        (path, names[top.name], split)
        for split, top in tops
        for path in folders.photographs(folder, top, left_out)
    ]
    seen = look_at(folder, files)
    images = [each for each in seen if isinstance(each.picture, Picture)]
    if lacking := sorted(set(names.values()) - {each.name for each in images}):
        bad = next(
            (f" ({each.path}: {each.picture})" for each in seen if each.name == lacking[0]), ""
        )
        raise StageError(
            f"{folder}: no usable image of {lacking[0]}{bad}; add some, or remove its folder"
        )
    splits = Counter(each.split for each in images if each.split)
    renamed = {top: shown for top, shown in names.items() if top != shown}
    source = {"kind": "folder", "path": str(folder.resolve())}
    front = {
        "pretty_name": name.replace("_", " "),
        "version": 1,
        "noun": noun,
        "kind": kind,
        "license": "unknown",
        "redistribute": False,
        "task_categories": ["image-classification"],
        "size_categories": [size_category(len(images))],
        **({"official_splits": dict(splits)} if splits else {}),
        "source": source | ({"folders": renamed} if renamed else {}),
        "classes": list(names.values()),
        "aliases": {},
    }
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{head}---\n\n" + "\n\n".join(body(name, list(names.values()), seen, left_out)) + "\n"
    )


def class_names(folder: Path, tops: Sequence[str]) -> dict[str, str]:
    """Folder name -> class name. Raises StageError when there are too few, or two read alike."""
    if len(tops) < 2:
        raise StageError(f"{folder} needs two or more class folders with images in them")
    names = dict(zip(tops, without_index([readable(top) for top in tops]), strict=True))
    by_key: dict[str, str] = {}
    for top, shown in names.items():
        other = by_key.setdefault(shown.casefold(), top)
        if other != top:
            raise StageError(f"folders {other} and {top} both read as {shown!r}; rename one")
    return names


def readable(folder_name: str) -> str:
    """A folder's class name: `Black_footed_Albatross` -> `Black footed Albatross`."""
    return clean_name(folder_name.replace("_", " ")) or folder_name


def without_index(names: Sequence[str]) -> list[str]:
    """Drop the leading numbers where they are an index: `001.Kite`, `002.Crow` -> `Kite`, `Crow`.

    Numbers are an index when every name has one of its own, they count from 0 or 1 or are padded
    with zeros to one width, and what is left are distinct names with letters. So `737-800` and
    `747-400`, or `3-series` beside `kite`, keep theirs.
    """
    parts = [INDEX.fullmatch(name) for name in names]
    numbers = [part[1] for part in parts if part]
    rest = [clean_name(part[2]) for part in parts if part]
    order = sorted(map(int, numbers))
    counted = order in (list(range(len(names))), list(range(1, len(names) + 1)))
    padded = len(set(map(len, numbers))) == 1 and any(n[0] == "0" for n in numbers)
    distinct = len({name.casefold() for name in rest}) == len(set(order)) == len(names)
    lettered = all(re.search(r"[^\W\d_]", name) for name in rest)
    return rest if distinct and lettered and (counted or padded) else list(names)


def look_at(folder: Path, files: Sequence[tuple[Path, str, str]]) -> list[Seen]:
    """Open every file. The pictures' bytes are dropped."""
    load = reader(folder)

    def one(file: tuple[Path, str, str]) -> Seen:
        path, name, split = folders.relative(file[0], folder), *file[1:]
        picture = open_picture(partial(load, path, 0))
        if isinstance(picture, Picture):
            picture = picture._replace(data=b"")
        return Seen(path, name, split, picture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(one, files)
        return list(progress(results, desc="card", total=len(files), unit="files"))


def body(
    name: str, classes: Sequence[str], seen: Sequence[Seen], left_out: folders.LeftOut
) -> list[str]:
    """The paragraphs of the card's text."""
    images = [(each, each.picture) for each in seen if isinstance(each.picture, Picture)]
    base = -(-len(classes) // 2)
    widths = [p.width for _, p in images]
    heights = [p.height for _, p in images]
    parts = [
        f"# {name}",
        f"{len(images):,} images of {len(classes)} classes, {min(widths)}x{min(heights)} to "
        f"{max(widths)}x{max(heights)} pixels (median {statistics.median_high(widths)}x"
        f"{statistics.median_high(heights)}).",
        f"Class ids follow the order of `classes`. Under the base_to_novel protocol the first {base} "
        f"({classes[0]} to {classes[base - 1]})\nare trained on and the other "
        f"{len(classes) - base} only evaluated. Add spellings a model may use under `aliases`\n"
        "(`class name: [spelling, ...]`), and raise `version` when the photographs change, so that "
        "they are read again.",
        "## Images per class",
        table(classes, [each for each, _ in images]),
    ]
    bad = [f"`{each.path}`: {each.picture}" for each in seen if isinstance(each.picture, Reject)]
    small = [
        f"`{each.path}`: {p.width}x{p.height}"
        for each, p in images
        if min(p.width, p.height) < SMALL
    ]
    parts += findings("Files that are no usable images", bad)
    if bad:
        parts.append(
            f"They are {len(bad) / len(seen):.1%} of the files. Download refuses more than "
            "`[Download] max_reject_share`."
        )
    for reason, paths in left_out.items():
        parts += findings(f"Left out, {reason}", [f"`{path}`" for path in paths])
    parts += findings(f"Images with a side under {SMALL} pixels", small)
    return parts + repeats([each for each, _ in images], [picture for _, picture in images])


def table(classes: Sequence[str], images: Sequence[Seen]) -> str:
    """Images per class and split, as a Markdown table."""
    splits = [s for s in ("train", "val", "test", "") if any(each.split == s for each in images)]
    counts = Counter((each.name, each.split) for each in images)
    rows = [["class", *(split or "images" for split in splits)], ["---", *("---:" for _ in splits)]]
    rows += [[name, *(str(counts[name, split]) for split in splits)] for name in classes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def repeats(images: Sequence[Seen], pictures: Sequence[Picture]) -> list[str]:
    """The sections on pictures that occur, exactly or nearly, in two classes or two splits."""
    pixels, dhash = [p.pixels for p in pictures], [p.dhash for p in pictures]
    sections = []
    for what, keys in (
        ("two classes", [each.name for each in images]),
        ("two splits", [each.split for each in images]),
    ):
        number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        pairs = twins(pixels, dhash, [number[key] for key in keys], NEAR)
        lines = [
            f"`{images[t.later].path}` and `{images[t.earlier].path}`: "
            + ("the same pixels" if t.distance < 0 else f"{t.distance} of 64 bits apart")
            for t in pairs
        ]
        sections += findings(f"The same or nearly the same picture in {what}", lines)
    return sections


def findings(title: str, lines: Sequence[str]) -> list[str]:
    """A section with the number of findings and the first of them; empty without findings."""
    if not lines:
        return []
    rest = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"## {title}: {len(lines)}", "\n".join([*(f"- {x}" for x in lines[:SHOWN]), *rest])]


def size_category(count: int) -> str:
    """The size category of a Hugging Face dataset card."""
    for below, text in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < below:
            return text
    return "100K<n<1M" if count < 1_000_000 else "n>1M"


def main() -> None:
    """Write the card, unless a card of that name exists."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.draft_card",
        description=__doc__.partition("\n\n")[2],
        epilog="example: python -m tasks.draft_card my_birds ~/photos/birds --noun bird --kind species",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="the card's name: lower-case letters, digits, underscores")
    parser.add_argument(
        "folder", type=Path, help="class_name/*.jpg, optionally under train/, test/"
    )
    parser.add_argument("--noun", default="object", help="what the photographs show (bird, car)")
    parser.add_argument("--kind", default="kind", help="what is asked for (species, model)")
    arguments = parser.parse_args()
    folder = Path("cards") if Path("cards").is_dir() else FOLDER
    path = folder / f"{arguments.name}.md"
    if path.exists():
        sys.exit(f"error: {path} exists; edit it, or choose another name")
    try:
        text = draft(arguments.name, arguments.folder.expanduser(), arguments.noun, arguments.kind)
    except StageError as error:
        sys.exit(f"error: {error}")
    write_text(path, text)
    for line in text.splitlines():
        if line.startswith("## ") and ": " in line:
            print(f"look at    {line[3:]}")
    print(f"wrote {path}; look through it, then: make train DATASET={arguments.name}")


if __name__ == "__main__":
    main()
