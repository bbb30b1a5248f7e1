"""Stopping: Ctrl-C finishes the shard at hand, twice ends at once, and no process outlives its run."""

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
    """Whether this process was asked to stop, and what it is in the middle of, outermost first."""

    asked = False
    units: ClassVar[list[str]] = []


def stop_when_asked() -> None:
    """Once: at the end of the shard, where the work is done in shards. Twice: at once.

    A person presses Ctrl-C; whoever started this process hears it too, and says so by SIGUSR1.
    Where nothing is begun that could be finished, as while a model is loaded, once is enough.
    """

    def ask(*_: Any) -> None:
        if _Stop.asked:
            os._exit(STOPPED)  # engines in processes of their own see it and end themselves
        _Stop.asked = True
        if not _Stop.units:
            raise KeyboardInterrupt
        # Not by print: the signal may come in the middle of one.
        os.write(2, f"stopping after this {_Stop.units[-1]}\n".encode())

    started_by_hand = "DIVE_PARENT" not in os.environ
    signal.signal(signal.SIGINT, ask if started_by_hand else signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, ask)


@contextmanager
def shard_by_shard(unit: str = "shard") -> Iterator[None]:
    """Work that looks at `stop_asked` after each shard, or calls `stop_if_asked`.

    `unit` is what a shard is called here: a step of training, or the whole of a short stage.
    """
    _Stop.units.append(unit)
    try:
        yield
    finally:
        _Stop.units.pop()


def stop_asked() -> bool:
    """Whether to begin no further shard."""
    return _Stop.asked


def stop_if_asked() -> None:
    """Raises Stopped, after a shard is on disk, if the run was asked to stop."""
    if _Stop.asked:
        raise Stopped


def end_with_parent(group: bool = False) -> None:
    """End when the run that started this process is gone: a killed run must not go on working.

    With `group` the whole process group ends, which must then be this process's own.
    """
    if "DIVE_PARENT" not in os.environ:
        return  # started by hand
    parent, starter = int(os.environ["DIVE_PARENT"]), os.getppid()

    def lives() -> bool:
        if os.getppid() != starter:
            return False
        try:  # below a launcher, which may outlive the run that started it
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
