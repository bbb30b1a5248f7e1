"""Measures memory: the peak of a stage, with all of its descendants, and what is still free.

Linux keeps the peak of a process only as long as the process lives. So a thread reads the peaks of
all descendants once a second, and may miss the last second of one.
"""

import os
import resource
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

EVERY = 1.0  # seconds between two measurements
# What a process has from a fork is read again only as often as this share of a core's time allows: Linux
# takes 17 ms for each GiB of the process, measured in pages of 4 KiB.
SHARE = 0.01
PROC = Path("/proc")


def own_peak() -> float:
    """The peak memory of this process, in MB.

    getrusage is only the fallback: it also counts the process that this one was forked from.
    """
    return _peak(os.getpid()) or megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def megabytes(maxrss: int) -> float:
    """Convert `ru_maxrss` to MB. Linux reports it in kilobytes, macOS in bytes."""
    return maxrss / (1024 if sys.platform == "linux" else 1024**2)


class Watch:
    """Measures the process `root` and its descendants from a thread, in a `with` statement.

    `peak` is the largest sum, in MB, of the peaks of the processes alive at one time. It is an upper
    bound: their peaks need not coincide, and files that several of them map count in each. Memory that
    they still share after a fork counts once, where the system tells it. `peak` is 0.0 where `root`
    ended before the first measurement, or on a system other than Linux.
    """

    def __init__(self, root: int):
        self.root, self.peak = root, 0.0
        self._forked: dict[int, float] = {}  # MB that a process shares and others count
        self._due = 0.0
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
        """Measure the processes that are alive now."""
        pids, started = [self.root, *below(self.root)], time.monotonic()
        known = self._forked if started < self._due else {}
        self._forked = {pid: known[pid] if pid in known else _forked(pid) for pid in pids}
        if not known:
            self._due = started + (time.monotonic() - started) / SHARE
        own = (max(0.0, _peak(pid) - self._forked[pid]) for pid in pids)
        self.peak = max(self.peak, sum(own))


def below(root: int) -> list[int]:
    """The process ids of all descendants of `root`."""
    children = defaultdict(list)
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended
            # The process's name before its state may hold anything, parentheses too.
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


def _forked(pid: int) -> float:
    """MB of memory that a process shares by a fork, without its own part of them; 0.0 where it is not told."""
    with suppress(OSError, KeyError):
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        kilobytes = {name: int(value) for name, value, _ in map(str.split, lines[1:])}
        return (kilobytes["Anonymous:"] - kilobytes["Pss_Anon:"]) / 1024
    return 0.0


def available() -> float:
    """Free bytes of main memory, on this machine or within its container's limit."""
    free = float("inf")  # not Linux
    with suppress(OSError):
        entries = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
        free = 1024.0 * int(entries["MemAvailable"].split()[0])
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free
