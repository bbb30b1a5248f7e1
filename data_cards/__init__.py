"""Data cards: one Markdown file for each dataset, and the loader that reads them.

The YAML front matter is for the pipeline (source, noun, classes, aliases, splits); the body is for
people. All that the pipeline knows about a dataset comes from its card. A card is also a Hugging
Face dataset card, so Hugging Face's own keys may stand beside ours.
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_cards.words import any_of, clean_name, field_guide

__all__ = ["Card", "CardError", "any_of", "clean_name", "exists", "known", "load", "names_in"]

FOLDER = Path(__file__).parent
HUB_KEYS = {"config", "splits", "image", "label"}
# The keys that each kind of source must have, and those it may have.
SOURCE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "drawn": ({"seed", "images_per_class"}, set()),
    "folder": ({"path"}, {"folders"}),
    "hub": ({"repo", "revision"}, HUB_KEYS),
    "archive": ({"layout", "files"}, {"mirror", "crop_bottom"}),
}
LAYOUTS = ("cub", "flowers", "pets", "cars", "aircraft")
# Keys of Hugging Face dataset cards that the pipeline ignores.
HUGGING_FACE_KEYS = {
    "annotations_creators", "configs", "dataset_info", "language", "license_link",
    "paperswithcode_id", "pretty_name", "size_categories", "source_datasets", "tags",
    "task_categories", "viewer",
}  # fmt: skip
SPLITS = ("train", "val", "test", "pretrain")


class CardError(ValueError):
    """A card is missing or malformed; the message says where, and how to mend it."""


@dataclass(frozen=True)
class Card:
    """A dataset as the pipeline sees it.

    `classes` are the names by class id; `aliases` maps a class name to further spellings of it.
    `source` has the key `kind`, and further keys that depend on it (SOURCE_KEYS). `official_splits`
    maps a split to its image count, where there is an official split. `taxonomy` maps a group, such
    as a genus, to its classes, each group before the groups within it; `descriptions` maps a class to
    a text that says how it looks.
    `traits` maps a trait, such as the colour of the head, to the words for its values; then each
    description holds one word of each trait.
    `name_in_parentheses` says that an answer such as "Nuphar (water lily)" is the name in parentheses.
    """

    name: str
    version: int
    noun: str
    kind: str
    source: dict[str, Any]
    classes: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    license: str = "unknown"
    license_name: str = ""
    redistribute: bool = False
    name_in_parentheses: bool = False
    official_splits: dict[str, int] = field(default_factory=dict)
    taxonomy: dict[str, tuple[str, ...]] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    traits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sha256: str = ""

    def groups_of(self, class_name: str) -> tuple[str, ...]:
        """The groups of the taxonomy that hold this class, from the largest to the smallest."""
        return tuple(group for group, names in self.taxonomy.items() if class_name in names)

    def look(self, class_name: str) -> dict[str, str]:
        """Trait -> the word for it in the description of this class; empty without `traits`."""
        text = self.descriptions.get(class_name, "")
        return {
            trait: any_of(words).findall(text)[0].lower() for trait, words in self.traits.items()
        }


def load(name: str) -> Card:
    """Read `NAME.md` from `cards/` in the working directory, or from this package.

    Raises CardError naming the file and the key when something is missing, unknown or of the
    wrong type.
    """
    path = next((p for folder in _folders() if (p := folder / f"{name}.md").is_file()), None)
    if path is None:
        raise CardError(
            f"there is no data card {FOLDER / name}.md; known cards: {', '.join(known()) or 'none'}"
        )
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CardError(
            f"{path} is not UTF-8 (line {line}: {error.reason}); save it as UTF-8"
        ) from error
    return _parse(path, text, hashlib.sha256(data).hexdigest())


def exists(name: str) -> bool:
    """Whether there is a card of that name."""
    return any((folder / f"{name}.md").is_file() for folder in _folders())


def known() -> list[str]:
    """The names of all cards, sorted."""
    return sorted({card.stem for folder in _folders() for card in folder.glob("*.md")})


def _folders() -> list[Path]:
    return [Path("cards"), FOLDER]


@lru_cache(maxsize=16)  # every stage asks for its card; the text is part of the key
def _parse(path: Path, text: str, digest: str) -> Card:
    import yaml  # takes a tenth of a second, which `import pipeline.tasks` does without

    pieces = re.split(r"^---[ \t]*$", re.sub(r"\r\n?", "\n", text), maxsplit=2, flags=re.MULTILINE)
    if len(pieces) != 3 or pieces[0].strip():
        raise CardError(f"{path} must begin with YAML front matter between two lines of ---")
    try:
        # The C loader takes a tenth of the time, and a card is read by every stage.
        front = yaml.load(pieces[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise CardError(f"{path}: front matter is not valid YAML: {error}") from error
    if not isinstance(front, dict):
        raise CardError(f"{path}: front matter must be a mapping of keys to values")
    fields = set(Card.__dataclass_fields__) - {"name", "sha256"}
    for key in sorted(set(front) - fields - HUGGING_FACE_KEYS):
        raise CardError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(fields))}")
    for key in ("version", "noun", "kind", "source", "classes"):
        if key not in front:
            raise CardError(f"{path}: key {key!r} is missing")
    front = {key: value for key, value in front.items() if key in fields}
    _check_source(path, front["source"])
    _check_facts(path, front)
    classes = _classes(path, front["classes"])
    front |= {
        "classes": classes,
        "aliases": _aliases(path, front.get("aliases") or {}, classes),
    }
    try:
        front |= field_guide(front, classes)
    except ValueError as error:
        raise CardError(f"{path}: {error}") from error
    return Card(name=path.stem, sha256=digest, **front)


def names_in(dataset: str) -> list[str]:
    """The card names of a mix such as `cub+flowers`, sorted, because their order means nothing.

    Raises CardError when a name is empty or comes twice.
    """
    names = sorted(dataset.split("+"))
    if not all(names) or len(set(names)) != len(names):
        raise CardError(f"dataset {dataset!r} must be a card's name, or different ones joined by +")
    return names


def _classes(path: Path, classes: Any) -> tuple[str, ...]:
    if not isinstance(classes, list) or not all(isinstance(c, str) and c.strip() for c in classes):
        raise CardError(f'{path}: classes must be a list of non-empty names; quote names like "no"')
    cleaned: dict[str, str] = {}
    for name in classes:
        if not (shown := clean_name(name)):
            raise CardError(f"{path}: the class {name!r} is only punctuation")
        if shown in cleaned:
            raise CardError(
                f"{path}: classes must be distinct names; {cleaned[shown]!r} and {name!r} are both "
                f"{shown!r}"
            )
        cleaned[shown] = name
    if len(cleaned) < 2:
        raise CardError(f"{path}: classes must be two or more distinct names")
    return tuple(cleaned)


def _aliases(path: Path, aliases: Any, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    if not isinstance(aliases, dict):
        raise CardError(f"{path}: aliases must map a class name to a list of spellings")
    by_class = {}
    for name, spellings in aliases.items():
        if clean_name(str(name)) not in classes:
            raise CardError(f"{path}: aliases names {name!r}, which is not among the classes")
        if not isinstance(spellings, list):
            raise CardError(f"{path}: the aliases of {name!r} must be a list of names")
        if odd := [spelling for spelling in spellings if not isinstance(spelling, str)]:
            raise CardError(
                f"{path}: the aliases of {name!r} must be texts; YAML reads one as {odd[0]!r}: put it "
                "between quotation marks"
            )
        by_class[clean_name(str(name))] = tuple(spellings)
    return by_class


def _check_facts(path: Path, front: dict[str, Any]) -> None:
    for key in ("noun", "kind"):
        if not isinstance(front[key], str) or not front[key].strip():
            raise CardError(f"{path}: {key} must be a word, such as bird or species")
    for key in ("redistribute", "name_in_parentheses"):
        if not isinstance(front.get(key, False), bool):
            raise CardError(f"{path}: {key} must be true or false; got {front[key]!r}")
    licence = front.get("license", "unknown")
    if not isinstance(licence, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise CardError(
            f"{path}: license must be an identifier such as cc-by-4.0, other or unknown; wording of "
            f"its own belongs under license_name or into the text; got {licence!r}"
        )
    splits = front.get("official_splits", {})
    counts = isinstance(splits, dict) and all(type(count) is int for count in splits.values())
    if not counts or not set(splits) <= set(SPLITS):
        raise CardError(f"{path}: official_splits must map {', '.join(SPLITS)} to image counts")


def _check_source(path: Path, source: Any) -> None:
    if not isinstance(source, dict) or source.get("kind") not in SOURCE_KEYS:
        raise CardError(f"{path}: source.kind must be one of {', '.join(SOURCE_KEYS)}")
    needed, allowed = SOURCE_KEYS[source["kind"]]
    for key in sorted(needed - set(source)):
        raise CardError(f"{path}: source of kind {source['kind']} lacks the key {key!r}")
    for key in sorted(set(source) - needed - allowed - {"kind"}):
        raise CardError(
            f"{path}: source of kind {source['kind']} has no key {key!r}; "
            f"known keys: {', '.join(sorted(needed | allowed))}"
        )
    folders = source.get("folders") or {}
    for text in (*folders, *folders.values()) if isinstance(folders, dict) else (folders,):
        if not isinstance(text, str):
            raise CardError(
                f"{path}: source.folders must map folder names to class names; YAML reads one as "
                f"{text!r}: put it between quotation marks"
            )
    if source["kind"] != "archive":
        return
    mirror = source.get("mirror", {"repo": ""})
    if not isinstance(mirror, dict) or not {"repo"} <= set(mirror) <= HUB_KEYS | {
        "repo",
        "revision",
    }:
        raise CardError(
            f"{path}: source.mirror has repo and, if need be, revision, {', '.join(sorted(HUB_KEYS))}"
        )
    if source["layout"] not in LAYOUTS:
        raise CardError(f"{path}: source.layout must be one of {', '.join(LAYOUTS)}")
    files = source["files"]
    if not isinstance(files, list) or not files:
        raise CardError(f"{path}: source.files must be a list of files with name and md5")
    for file in files:
        if not isinstance(file, dict) or not {"name", "md5"} <= set(file) <= {"name", "md5", "url"}:
            raise CardError(f"{path}: each of source.files has name, md5 and, if it has one, url")
        if Path(file["name"]).name != file["name"]:
            raise CardError(f"{path}: {file['name']!r} is not a plain file name")
