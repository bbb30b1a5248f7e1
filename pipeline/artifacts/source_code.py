"""Which of the project's own modules a stage runs, and a digest of each.

A stage's result can change with any module that its own one imports, however far down. So the
manifest keeps a digest of each, and a run says which have changed since. Imports are found in the
text, those inside functions too: nothing is imported. A package's templates count with it.
"""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("tasks", "training", "data_cards")  # where stages and all they import live
TEMPLATES = (".jinja", ".css", ".js")
_NAME = rf"(?:{'|'.join(ROOMS)})(?:\.\w+)*"
_FROM = re.compile(
    rf"^[ \t]*from[ \t]+({_NAME})[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE
)
_IMPORT = re.compile(rf"^[ \t]*import[ \t]+({_NAME})", re.MULTILINE)


def digests(module: str) -> dict[str, str]:
    """Path below the project -> sha256 (16 hex digits): a module, all of ours it imports, templates."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        path = _path(waiting.pop())
        if path is None or (name := path.relative_to(ROOT).as_posix()) in found:
            continue
        found[name], imported = _read(path)
        waiting += imported
        for template in _templates(path):
            found[template.relative_to(ROOT).as_posix()] = _digest(template)
    return found


def changed(recorded: dict[str, Any], module: str) -> list[str]:
    """The modules that differ from those an artifact was made by, as its manifest records them.

    A module that came or went counts. Older manifests know the stage's own module alone.
    """
    now, then = digests(module), recorded.get("sources")
    if then is None:
        own = next(iter(now), "")
        whole = hashlib.sha256((ROOT / own).read_bytes()).hexdigest() if own else ""
        return [own] if recorded.get("source_sha256") != whole else []
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def told(names: list[str]) -> str:
    """Some changed modules in words."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} changed since, and code_version did not"


@cache
def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's digest, and the modules that it may import."""
    data = path.read_bytes()
    text = data.decode("utf-8")
    modules = _IMPORT.findall(text)
    for package, names in _FROM.findall(text):
        # A name may be a module of the package, or something in it.
        modules += [package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))]
    return hashlib.sha256(data).hexdigest()[:16], tuple(dict.fromkeys(modules))


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def _templates(module: Path) -> list[Path]:
    """What a package renders pages from; nothing for a module."""
    if module.name != "__init__.py":
        return []
    return sorted(path for path in module.parent.iterdir() if path.suffix in TEMPLATES)


@cache
def _path(module: str) -> Path | None:
    """The file of a module of ours; of a package, its own. None for what is no module."""
    place = ROOT.joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None
