"""Write a draft card for a folder of photographs: `python -m data_cards my_birds ~/photos/birds`.

The folder holds `class_name/*.jpg`, or the same under `train/` and `test/`. Class names are taken
from the folders, with underscores read as spaces and a leading "001." dropped.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import yaml

from data_cards import FOLDER

SPLITS = {"train", "val", "validation", "test"}


def draft(name: str, folder: Path, noun: str, kind: str) -> str:
    """The text of a card for `folder`.

    Raises ValueError, in one sentence, when there are no class folders or two give one name.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise ValueError(f"NAME {name!r} must be lower-case letters, digits and underscores")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    tops = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    if any(path.name in SPLITS for path in tops):
        tops = [p for top in tops for p in sorted(top.iterdir()) if p.is_dir() and p.name[0] != "."]
    folders = sorted({path.name for path in tops})
    if len(folders) < 2:
        raise ValueError(f"{folder} needs two or more class folders with images in them")
    names = {folder_name: readable(folder_name) for folder_name in folders}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = [folder_name for folder_name, name in names.items() if name == twice[0]]
        raise ValueError(f"folders {both[0]} and {both[1]} both read as {twice[0]!r}; rename one")
    source = {"kind": "folder", "path": str(folder.resolve())}
    renamed = {folder_name: name for folder_name, name in names.items() if folder_name != name}
    front = {
        "version": 1,
        "noun": noun,
        "kind": kind,
        "license": "unknown",
        "redistribute": False,
        "source": source | ({"folders": renamed} if renamed else {}),
        "classes": [names[folder_name] for folder_name in folders],
        "aliases": {},
    }
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{text}---\n\n# {name}\n\nClass ids follow the order of `classes`; under the "
        f"base_to_novel protocol the first half is trained on and the second half only evaluated.\n"
        f"Add spellings a model may use under `aliases` (`class name: [spelling, ...]`), and raise\n"
        f"`version` when the photographs change, so that they are read again.\n"
    )


def readable(folder_name: str) -> str:
    """`001.Black_footed_Albatross` -> `Black footed Albatross`."""
    return " ".join(re.sub(r"^\d+[._-]+", "", folder_name).replace("_", " ").split())


def main() -> None:
    """Write the card, unless there is one of that name already."""
    parser = argparse.ArgumentParser(prog="python -m data_cards", description=__doc__)
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
    except ValueError as error:
        sys.exit(f"error: {error}")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}; look through it, then: make train DATASET={arguments.name}")


if __name__ == "__main__":
    main()
