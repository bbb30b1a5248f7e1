"""What a stage takes of memory: its own process and those that it starts.

On Linux the kernel keeps each process's peak, for as long as the process is there; so those of the
processes below a stage are looked at again and again, and the last second of one may be missed.
"""

import os
import resource
import sys
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

EVERY = 1.0  # seconds between two looks
PROC = Path("/proc")


def own_peak() -> float:
    """The most memory that this process has had, in MB.

    Not by getrusage where it can be helped: that counts what the process was forked from as well.
    """
    return _peak(os.getpid()) or megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def megabytes(maxrss: int) -> float:
    """`ru_maxrss` in MB: it counts kilobytes, but bytes on macOS."""
    return maxrss / (1024 if sys.platform == "linux" else 1024**2)


class Watch:
    """Looks at `root` and the processes below it from a thread, in a `with` statement.

    `peak` is the largest sum, in MB, of the peaks of processes that were there at one time. It is an
    upper bound, for they need not have had their peaks together, and what they share is counted in
    each. 0.0 where `root` ended before the first look, or the system does not tell.
    """

    def __init__(self, root: int):
        self.root, self.peak = root, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _look_again(self) -> None:
        while not self._over.wait(EVERY):
            self.look()

    def look(self) -> None:
        """Take note of the processes that are there now."""
        self.peak = max(self.peak, sum(map(_peak, [self.root, *below(self.root)])))


def below(root: int) -> list[int]:
    """The processes that `root` started, those that they started, and so on."""
    children = defaultdict(list)
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended
            # The name before the state may hold anything, brackets too.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children[parent].append(int(folder.name))
    descendants, waiting = [], [root]
    while waiting:
        fresh = children.pop(waiting.pop(), [])
        descendants += fresh
        waiting += fresh
    return descendants


def _peak(pid: int) -> float:
    with suppress(OSError):
        for line in (PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0
