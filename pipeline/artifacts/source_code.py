"""Digests of the project's own modules that a stage imports, directly or not.

A stage's result can change with any of these modules. So the manifest keeps a digest of each, and a
run warns about those that have changed since. Imports are found by reading the source text, inside
functions too; no module is imported. A package's templates count as part of it.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

from tasks.tables.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("tasks", "training", "data_cards")  # the packages of the stages and all that they import
TEMPLATES = (".jinja", ".css", ".js")
_NAME = rf"(?:{'|'.join(ROOMS)})(?:\.\w+)*"
_FROM = re.compile(
    rf"^[ \t]*from[ \t]+({_NAME})[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)", re.MULTILINE
)
_IMPORT = re.compile(rf"^[ \t]*import[ \t]+({_NAME})", re.MULTILINE)


def digests(module: str) -> dict[str, str]:
    """Path below the project's root -> sha256 (16 hex digits).

    The paths are those of `module`, of every module of ours that it imports, and of their templates.
    """
    digest_of: dict[str, str] = {}
    waiting = [module]
    while waiting:
        path = _path(waiting.pop())
        if path is None or (name := path.relative_to(ROOT).as_posix()) in digest_of:
            continue
        digest_of[name], imported = _read(path)
        waiting += imported
        for template in _templates(path):
            digest_of[template.relative_to(ROOT).as_posix()] = _digest(template)
    return digest_of


def changed(recorded: Manifest, module: str) -> list[str]:
    """The paths of the modules that differ from those that `recorded` was made by.

    A module that was added or removed counts. Older manifests know the stage's own module alone.
    """
    now, then = digests(module), recorded.sources
    if then is None:
        own = next(iter(now), "")
        whole = hashlib.sha256((ROOT / own).read_bytes()).hexdigest() if own else ""
        return [own] if recorded.source_sha256 != whole else []
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def change_note(names: list[str]) -> str:
    """A warning that names the first three changed modules."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} changed since, and code_version did not"


@cache
def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's digest, and the names of the modules that it may import."""
    data = path.read_bytes()
    text = data.decode("utf-8")
    modules = _IMPORT.findall(text)
    for package, names in _FROM.findall(text):
        # An imported name may be a module of the package, or an attribute of it.
        modules += [package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))]
    return hashlib.sha256(data).hexdigest()[:16], tuple(dict.fromkeys(modules))


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def _templates(module: Path) -> list[Path]:
    """The template files of a package; none for a plain module."""
    if module.name != "__init__.py":
        return []
    return sorted(path for path in module.parent.iterdir() if path.suffix in TEMPLATES)


@cache
def _path(module: str) -> Path | None:
    """The file of a module of ours, `__init__.py` for a package. None for any other name."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None
