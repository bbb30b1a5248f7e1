"""Reads a folder of photographs: its split folders, its class folders, and their files.

`make card` and Download both list a folder here, so they agree on what is a photograph. Files that
never were one, such as `Thumbs.db`, are left out and named; they count neither as images nor as
rejects.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from tasks.runtime.errors import StageError

SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# Further names of the same splits. Case, separators and a word such as "set" at the end are ignored.
_SPLIT_NAMES = SPLITS | {"training": "train", "valid": "val", "dev": "val", "testing": "test"}
_SPLIT_ENDS = ("set", "sets", "data", "images", "imgs", "split")
# What such a file holds must be a photograph, or the file is rejected. The bytes of any other file
# decide whether it is one.
_SUFFIXES = frozenset(
    """.jpg .jpeg .jpe .jfif .png .gif .bmp .dib .tif .tiff .webp .avif .heic .heif .hif .jp2 .j2k
    .jpx .jxl .ppm .pgm .pbm .pnm .tga .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw
    """.split()  # noqa: SIM905 - as a list it would take a screen
)
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
NO_PHOTOGRAPH = "no photographs"
OUTSIDE = "photographs outside the class folders"
BROKEN = "links beside the class folders that lead nowhere"
LINKED = "links to folders, which are not followed"
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}")
SHOWN = 5  # names of files left out that a line shows

LeftOut = dict[str, list[str]]  # why files are left out -> their paths below the folder


def split_named(text: str) -> str | None:
    """The split that a folder or a table names: `Train`, `TEST_SET` and `validation` name one."""
    name = re.sub(r"[\W_]+", "", text).casefold()
    ends = (name.removesuffix(end) for end in _SPLIT_ENDS)
    return next((_SPLIT_NAMES[n] for n in (name, *ends) if n in _SPLIT_NAMES), None)


def class_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, class folder) for each class folder below `root`; the split is "" without split folders.

    Raises StageError for any other folder beside train/ and test/, for two folders that hold the
    same subfolders, and for a folder whose name is not UTF-8.
    """
    tops = _require_utf8(root, _folders(root))
    splits = [path for path in tops if split_named(path.name)]
    if len(splits) == 1 < len(tops) and not _folders(splits[0]) and any(splits[0].iterdir()):
        splits = []  # a class called "train" holds photographs, a split holds folders
    if not splits:
        _refuse_groups(root, tops)
        return [("", path) for path in tops]
    if stray := [path.name for path in tops if path not in splits]:
        raise StageError(
            f"{root}: {stray[0]} stands beside {splits[0].name}/; move it away, or name it train/, val/ or "
            "test/ if it is a split"
        )
    classes = {top: _require_utf8(root, _folders(top)) for top in tops}
    return [(split_named(top.name) or "", path) for top in tops for path in classes[top]]


def photographs(root: Path, folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Every photograph below a class folder, sorted; the other files are added to `left_out`."""
    for path in files_below(folder):
        if path.is_dir():
            left_out.setdefault(LINKED, []).append(relative(path, root))
        elif is_photograph(path):
            yield path
        else:
            left_out.setdefault(NO_PHOTOGRAPH, []).append(relative(path, root))


def outside(root: Path, tops: list[tuple[str, Path]]) -> LeftOut:
    """The photographs and broken links beside the class folders `tops`, or beside the split folders."""
    beside = sorted({root, *(path.parent for _, path in tops)})
    left_out: LeftOut = {}
    for path in (path for top in beside for path in sorted(top.iterdir()) if path.name[0] != "."):
        if path.is_symlink() and not path.exists():  # perhaps a class folder on another disk
            left_out.setdefault(BROKEN, []).append(relative(path, root))
        elif path.is_file() and is_photograph(path):
            left_out.setdefault(OUTSIDE, []).append(relative(path, root))
    return left_out


def described(left_out: LeftOut) -> list[str]:
    """A line for each reason why files are left out, with the first of their paths."""
    return [
        f"left out, {reason}: {len(paths)} ({', '.join(paths[:SHOWN])}"
        + (", ...)" if len(paths) > SHOWN else ")")
        for reason, paths in left_out.items()
    ]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file and link at any depth, sorted. Hidden files are left out, no link is followed."""
    with os.scandir(folder) as entries:
        children = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries if e.name[0] != "."]
    for name, is_folder in sorted(children):
        path = folder / name
        if is_folder:
            yield from files_below(path)
        elif path.is_file() or path.is_symlink():
            yield path


def is_photograph(path: Path) -> bool:
    """Whether the file is meant as a photograph, by the end of its name or else by its bytes.

    A photograph may still be damaged: whoever opens it says so.
    """
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with Image.open(path, formats=_formats()):
            return True
    except (UnidentifiedImageError, FileNotFoundError, ValueError):
        return False
    except (OSError, Image.DecompressionBombError):
        return True


def relative(path: Path, root: Path) -> str:
    """The path below `root` as text. Bytes of a name that are not UTF-8 become `\\xe9`."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def why_missing(path: Path) -> str:
    """Why a listed file cannot be found."""
    if path.is_symlink():
        return "a link to a file that is not there"
    if _ESCAPED.search(str(path)):
        return "its name is not UTF-8; rename it"
    return "listed, but there is no such file"


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats of photographs that this Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(root / e.name for e in entries if e.name[0] != "." and e.is_dir())


def _require_utf8(root: Path, tops: list[Path]) -> list[Path]:
    """The folders `tops`. Raises StageError for one whose name is not UTF-8."""
    for path in tops:
        if (shown := relative(path, root)) != path.relative_to(root).as_posix():
            raise StageError(f"{root}: the name of folder {shown} is not UTF-8; rename it")
    return tops


def _refuse_groups(root: Path, tops: list[Path]) -> None:
    """Raise StageError where two folders hold mostly the same subfolders: groups, not classes."""
    holder: dict[str, Path] = {}
    contents = {top: {path.name.casefold() for path in _folders(top)} for top in tops}
    for top, names in contents.items():
        for other, shared in Counter(holder[n] for n in names if n in holder).items():
            if 2 * shared >= min(len(names), len(contents[other])):
                both = sorted(names & contents[other])
                raise StageError(
                    f"{root}: {other.name}/ and {top.name}/ hold the same subfolders "
                    f"({', '.join(both[:3])}), so they are no classes; name them train/, val/ or "
                    "test/ if they are splits, or else put the class folders at the top"
                )
        for name in names:
            holder.setdefault(name, top)
