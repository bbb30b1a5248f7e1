"""Data cards: one Markdown file per dataset, and the one loader that reads them.

The YAML front matter is what the machine needs (source, noun, classes, aliases, protocol); the
body is for people. Everything the pipeline knows about a dataset comes from its card.
"""

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
# The keys that each kind of source must have, and those it may have.
SOURCE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "drawn": ({"seed", "images_per_class"}, set()),
    "folder": ({"path"}, {"folders"}),
    "hub": ({"repo", "revision"}, {"config", "splits", "image", "label"}),
    "archive": ({"layout", "files"}, {"mirror", "crop_bottom"}),
}
LAYOUTS = ("cub", "flowers", "pets", "cars", "aircraft")


class CardError(ValueError):
    """A card that is missing or cannot be understood; the message says where and how to mend it."""


@dataclass(frozen=True)
class Card:
    """A dataset as the pipeline sees it.

    `classes` are the names by class id; `aliases` maps a class name to further spellings of it.
    `source` always holds `kind`; its other keys belong to that kind (see `tasks/download.py`).
    """

    name: str
    version: int
    noun: str
    kind: str
    source: dict[str, Any]
    classes: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    license: str = "unknown"
    redistribute: bool = False
    sha256: str = ""


def load(name: str) -> Card:
    """Read `NAME.md` from `cards/` in the working directory, or from this package.

    Raises CardError naming the file and the key when something is missing, unknown or of the
    wrong type.
    """
    places = [Path("cards"), FOLDER]
    path = next((p for folder in places if (p := folder / f"{name}.md").is_file()), None)
    if path is None:
        known = sorted({card.stem for folder in places for card in folder.glob("*.md")})
        raise CardError(
            f"there is no data card {FOLDER / name}.md; known cards: {', '.join(known) or 'none'}"
        )
    text = path.read_bytes()
    return _parse(path, text.decode("utf-8"), hashlib.sha256(text).hexdigest())


@lru_cache(maxsize=16)  # every stage asks for its card; the text is part of the key
def _parse(path: Path, text: str, digest: str) -> Card:
    import yaml  # a tenth of a second that `import pipeline.tasks` need not spend

    pieces = text.split("---\n", 2)
    if len(pieces) != 3 or pieces[0].strip():
        raise CardError(f"{path} must begin with YAML front matter between two lines of ---")
    try:
        # The C loader takes a tenth of the time, and a card is read by every stage.
        front = yaml.load(pieces[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise CardError(f"{path}: front matter is not valid YAML: {error}") from error
    if not isinstance(front, dict):
        raise CardError(f"{path}: front matter must be a mapping of keys to values")
    known = set(Card.__dataclass_fields__) - {"name", "sha256"}
    for key in sorted(set(front) - known):
        raise CardError(f"{path}: unknown key {key!r}; known keys: {', '.join(sorted(known))}")
    for key in ("version", "noun", "kind", "source", "classes"):
        if key not in front:
            raise CardError(f"{path}: key {key!r} is missing")
    classes = front["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) and c.strip() for c in classes):
        raise CardError(f'{path}: classes must be a list of non-empty names; quote names like "no"')
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise CardError(f"{path}: classes must be two or more distinct names")
    source = front["source"]
    _check_source(path, source)
    aliases = front.get("aliases") or {}
    for name in aliases:
        if name not in classes:
            raise CardError(f"{path}: aliases names {name!r}, which is not among the classes")
        if not isinstance(aliases[name], list):
            raise CardError(f"{path}: the aliases of {name!r} must be a list of names")
    front |= {
        "classes": tuple(classes),
        "aliases": {name: tuple(also) for name, also in aliases.items()},
    }
    return Card(name=path.stem, sha256=digest, **front)


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
    if source["kind"] != "archive":
        return
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
