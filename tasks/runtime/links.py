"""Hard links, so that gigabytes which do not change are on the disk once.

A hard link is a second name of the same file, so nobody may write to it in place. Whoever replaces
such a file deletes the name first; the other names keep the old file.
"""

import os
import shutil
from pathlib import Path


def link(source: Path, target: Path) -> bool:
    """Hard-link `target` to `source`, or copy it where links are impossible. Returns whether it linked.

    Symbolic links are followed first: files in the hub's cache are links to content-named files.
    """
    source = source.resolve()
    target.unlink(missing_ok=True)  # left by an earlier attempt
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or another user's file
        shutil.copyfile(source, target)
        return False
    return True


def link_tree(source: Path, target: Path) -> None:
    """Make a new folder tree whose files are links to those of `source`."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (link_tree if path.is_dir() else link)(path, target / path.name)
