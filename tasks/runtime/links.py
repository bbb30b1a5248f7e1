"""Files under a second name, so that gigabytes that do not change are on the disk once.

A link is a name of the same file: it must never be written through. Whoever writes where a link may
be removes the name first, which leaves the file to its other names.
"""

import os
import shutil
from pathlib import Path


def link(source: Path, target: Path) -> bool:
    """Give a file a second name, or copy it where that cannot be; whether it is a link.

    A file of the hub's cache is itself a symbolic link, to one that is named by its content.
    """
    source = source.resolve()
    target.unlink(missing_ok=True)  # of an attempt before
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or a file of somebody else's
        shutil.copyfile(source, target)
        return False
    return True


def link_tree(source: Path, target: Path) -> None:
    """A folder of its own with the files of another, and so of the folders in it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (link_tree if path.is_dir() else link)(path, target / path.name)
