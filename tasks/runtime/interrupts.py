"""Ctrl-C: once finishes the current shard, twice ends at once; a child ends with its parent run."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from tasks.runtime.errors import Stopped
from tasks.runtime.protocol import STOPPED


class _Stop:
    """Whether this process was asked to stop, and the units of work it is in, outermost first."""

    asked = False
    units: ClassVar[list[str]] = []


def stop_when_asked() -> None:
    """Install the signal handlers that stop this process.

    The first signal stops it at the end of the current shard, the second at once. Outside
    `shard_by_shard`, as while a model loads, the first one already stops it at once. A process that
    was started by hand gets Ctrl-C itself; a child gets SIGUSR1 from its parent instead.
    """

    def ask(*_: Any) -> None:
        if _Stop.asked:
            os._exit(STOPPED)  # worker processes notice it and end themselves
        _Stop.asked = True
        if not _Stop.units:
            raise KeyboardInterrupt
        # Not by print: the signal may arrive during a print.
        os.write(2, f"stopping after this {_Stop.units[-1]}\n".encode())

    started_by_hand = "DIVE_PARENT" not in os.environ
    signal.signal(signal.SIGINT, ask if started_by_hand else signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, ask)


@contextmanager
def shard_by_shard(unit: str = "shard") -> Iterator[None]:
    """Mark work that checks `stop_asked`, or calls `stop_if_asked`, after each shard.

    `unit` is the word for a shard in messages: a training step, or the whole of a short stage.
    """
    _Stop.units.append(unit)
    try:
        yield
    finally:
        _Stop.units.pop()


def stop_asked() -> bool:
    """Whether this process was asked to stop: begin no further shard."""
    return _Stop.asked


def stop_if_asked() -> None:
    """Raise Stopped if this process was asked to stop. Call it once a shard is on disk."""
    if _Stop.asked:
        raise Stopped


def end_with_parent(group: bool = False) -> None:
    """End this process when the run that started it is gone, so that a killed run stops working.

    With `group` the whole process group ends; this process must then lead a group of its own.
    """
    if "DIVE_PARENT" not in os.environ:
        return  # started by hand
    parent, starter = int(os.environ["DIVE_PARENT"]), os.getppid()
    # A forked engine's own parent is the fork server. The run may be gone, and yet have its number
    # still, if nobody has asked how it ended.
    run = multiprocessing.parent_process()

    def lives() -> bool:
        if os.getppid() != starter or (run is not None and not run.is_alive()):
            return False
        try:  # a launcher between the two may outlive the run
            os.kill(parent, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def watch() -> None:
        while lives():
            time.sleep(0.5)
        if group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
