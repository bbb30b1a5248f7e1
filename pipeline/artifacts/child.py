"""A stage's process: started, listened to, interrupted, and told of when it fails.

What it says goes to the terminal as it comes and into a log beside its files, without the values
of any tokens. Ctrl-C once lets it finish the shard, step or short stage it is at, twice ends it at once.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tasks.runtime.memory import Watch, megabytes

LOG = "run.log"
PROGRESS = (
    ".progress.json"  # what the child's progress bar stands at: see tasks/runtime/progress.py
)
STOPPED = 130  # exit code of a child that was asked to stop, and did
SECRET = ("TOKEN", "API_KEY", "SECRET", "PASSWORD", "ACCESS_KEY")  # ends of variables' names
LAST_LINES = 12
POLL = 1.0

Told = Callable[[str, int | None], None]  # a status message, and percent done where known


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative for a signal), its last lines, and the peak memory in
    MB of it and the processes it started, as `tasks.runtime.memory.Watch` has it;
    `stopped` when Ctrl-C was pressed and it ended well nevertheless."""

    code: int
    memory: float
    last_lines: tuple[str, ...]
    stopped: bool


def run(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    *,
    inherited: int,
    on_progress: Told | None = None,
) -> Ended:
    """Run `command`, whose working folder is `folder`, to its end.

    `inherited` is a descriptor that it inherits; `on_progress` is told about once a second how far
    it is. Raises KeyboardInterrupt when it was stopped by Ctrl-C.
    """
    (folder / PROGRESS).unlink(missing_ok=True)
    told: dict[str, str] = {"PYTHONUNBUFFERED": "1", "DIVE_PARENT": str(os.getpid())}
    if sys.stderr.isatty():
        told |= {"DIVE_TERMINAL": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}
    log = _Log(folder / LOG, secrets(os.environ))
    log.line(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %Z')} {shlex.join(command)}")
    direct = command[0] == sys.executable
    with _unheard() if direct else nullcontext():
        child = subprocess.Popen(
            command,
            pass_fds=[inherited],
            env={**os.environ, **environment, **told},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    streams = [(child.stdout, 1), (child.stderr, 2)]
    readers = [threading.Thread(target=log.copy, args=a, daemon=True) for a in streams]
    over = threading.Event()
    if on_progress:
        readers.append(threading.Thread(target=_follow, args=(folder, on_progress, over)))
    for reader in readers:
        reader.start()
    try:
        with Watch(child.pid) as watch, _interruptible(child, direct) as presses:
            _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        over.set()
        for reader in readers:
            reader.join(2)  # no longer: a process that the child left behind may hold its end
        log.close()
    child.returncode = code = os.waitstatus_to_exitcode(status)
    if presses and code != 0:
        raise KeyboardInterrupt
    memory = watch.peak
    if code != 0 or not memory:
        # Exact to the end, but of one process, and of this one's size at least.
        memory = max(memory, megabytes(usage.ru_maxrss))
    return Ended(code, memory, tuple(log.last), bool(presses))


def secrets(environment: Any) -> list[bytes]:
    """The values of variables that hold tokens, longest first."""
    found = {
        value.encode()
        for name, value in environment.items()
        if name.upper().endswith(SECRET) and len(value) >= 8
    }
    return sorted(found, key=len, reverse=True)


def progress(folder: Path) -> dict[str, Any]:
    """What the child in `folder` last said of its progress: what, done, total, unit."""
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Log:
    """Two streams to the terminal and, as whole lines, to one file."""

    def __init__(self, path: Path, hidden: list[bytes]):
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._hidden = hidden
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # a full disk is told of by the stage itself
            self._file = path.open("ab", buffering=0)

    def copy(self, stream: IO[bytes], terminal: int) -> None:
        """Everything that comes, until the stream ends."""
        waiting, line = b"", b""
        while chunk := os.read(stream.fileno(), 1 << 16):
            waiting, rest = self._hide(waiting + chunk)
            with suppress(OSError):  # nobody looks any more
                os.write(terminal, waiting)
            *lines, line = (line + waiting).split(b"\n")
            for each in lines:
                self.line(_shown(each))
            line = line[line.rfind(b"\r", 0, -1) + 1 :][-(1 << 20) :]
            waiting = rest
        with suppress(OSError):
            os.write(terminal, waiting)
        if shown := _shown(line + waiting):
            self.line(shown)
        stream.close()

    def line(self, text: str) -> None:
        """One line, into the file and among the last ones."""
        with self._lock, suppress(OSError, ValueError):
            self.last.append(text)
            if self._file is not None:
                self._file.write(f"{text}\n".encode())

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _hide(self, text: bytes) -> tuple[bytes, bytes]:
        """`text` without secrets, and an end of it that may be the beginning of one."""
        for secret in self._hidden:
            text = text.replace(secret, b"***")
        held = 0
        for secret in self._hidden:
            for size in range(min(len(secret) - 1, len(text)), held, -1):
                if text.endswith(secret[:size]):
                    held = size
                    break
        return (text[:-held], text[-held:]) if held else (text, b"")


def _shown(line: bytes) -> str:
    """A line as a terminal shows it in the end: what a progress bar wrote over is gone."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip()


def _follow(folder: Path, told: Told, over: threading.Event) -> None:
    """Tell of every change, and of the last one after the end."""
    before: dict[str, Any] = {}
    ended = False
    while not ended:
        ended = over.wait(POLL)
        now = progress(folder)
        if now and now != before:
            before = now
            total, done = now.get("total"), now.get("done", 0)
            of = f" of {total:,}" if total else ""
            percent = min(100, int(100 * done / total)) if total else None
            with suppress(Exception):  # a scheduler that is not there now is no reason to stop
                told(f"{now.get('what')}: {done:,}{of} {now.get('unit')}", percent)


@contextmanager
def _unheard() -> Iterator[None]:
    """What is started here ignores Ctrl-C from its first moment, while it still imports: a terminal
    sends it to everybody, and this process passes it on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interruptible(child: subprocess.Popen, direct: bool) -> Iterator[list[int]]:
    """The child finishes what it is at on the first Ctrl-C and ends on the second; yields the presses.

    What it is at (a shard, a step, a short stage) the child itself knows and says: see tasks/runtime/progress.py.

    Only the main thread hears of Ctrl-C; elsewhere the child is left to itself.
    """
    presses: list[int] = []

    def on_press(*_: Any) -> None:
        presses.append(1)
        if len(presses) == 1:
            print("stopping; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            sys.excepthook = _say_nothing
            # A launcher does not know SIGUSR1; it ends its processes, which leave checkpoints.
            child.send_signal(signal.SIGUSR1 if direct else signal.SIGTERM)
        else:
            child.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, on_press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


def _say_nothing(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
