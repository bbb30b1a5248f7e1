"""Tells the user that a model is loading, which can take minutes: its name, size and time so far.

A load of a few seconds prints nothing. A log file gets a line a minute, a terminal a counting line.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

SOON = 5.0  # seconds before the first line
EVERY = 60.0  # seconds between two lines in a log file


@contextmanager
def loading(what: str) -> Iterator[Callable[[], None]]:
    """Print `what` if the block takes long; yields a function that ends the waiting early.

    Of several processes under a launcher only the first prints. The lines also appear while
    `tasks.engines.base.quiet_start` hides standard error, if that is entered inside this block.
    """
    if os.environ.get("RANK", "0") != "0":
        yield lambda: None
        return
    terminal = sys.stderr.isatty() or bool(os.environ.get("DIVE_TERMINAL"))
    ended = threading.Event()
    kept = os.dup(2)
    thread = threading.Thread(
        target=_announce,
        args=(what, terminal, ended.wait, lambda text: os.write(kept, text.encode())),
        daemon=True,
    )
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()

    try:
        yield end
    finally:
        end()
        os.close(kept)


def opening(
    stage: str, policy: str | Path, backend: str
) -> AbstractContextManager[Callable[[], None]]:
    """The same for an engine of this `[engine] backend`, from its start to its first answer."""
    if backend == "server":  # the server has loaded it
        return nullcontext(lambda: None)
    return loading(f"{stage}: the engine loads {weights(policy)}")


def _announce(
    what: str, terminal: bool, wait: Callable[[float], bool], say: Callable[[str], object]
) -> None:
    """Print the lines by `say`. `wait(seconds)` returns True once there is nothing to wait for."""
    begin = time.monotonic()
    if wait(SOON):
        return
    width = shutil.get_terminal_size().columns - 1 if terminal else 0

    def line(text: str, end: str = "\n") -> None:
        say(f"\r{text:<{width}}{end}")  # from the left, over a progress bar that may stand there

    line(what)
    while not wait(1.0 if terminal else EVERY):
        line(f"still at it, {_duration(time.monotonic() - begin)}", "" if terminal else "\n")
    line(f"that took {_duration(time.monotonic() - begin)}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def weights(policy: str | Path) -> str:
    """A model in words: its size on disk and its folder, or its name on the hub."""
    folder = Path(policy)
    if not folder.is_dir():
        return f"{policy} from the Hugging Face hub, or from where it was downloaded to"
    files = [path for path in folder.iterdir() if path.is_file()]
    files = [path for path in files if path.suffix in (".safetensors", ".bin")] or files
    size = sum(path.stat().st_size for path in files)
    shown = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    return f"{shown} from {policy}"
