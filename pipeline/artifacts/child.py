"""Run a stage as a child process: its output, its log, its progress, Ctrl-C, its peak memory.

The child's output goes to the terminal at once, and line by line into a log in its working folder;
the values of secret variables are masked. The first Ctrl-C lets the child finish its current shard,
training step or short stage; the second ends it at once.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tasks.runtime.memory import Watch, megabytes
from tasks.runtime.protocol import PROGRESS_FILE

LOG = "run.log"
# A variable whose name ends so holds a secret.
SECRET = ("TOKEN", "API_KEY", "SECRET", "PASSWORD", "ACCESS_KEY")
LAST_LINES = 12  # kept for the error message
BAR = re.compile(r"\[\d[\d:]*[<,]")  # tqdm's time, as in `train:  50%|##  | 1/2 [00:05<00:05, ...]`
TRACEBACK = "Traceback (most recent call last):"
RANK = re.compile(r"^\[rank\d+\]: ")  # before each line of a process that torchrun started
POLL = 1.0  # seconds between two reads of the child's progress

# Takes a status message, and the percentage done or None.
ProgressListener = Callable[[str, int | None], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    `code` is the exit code, negative for a signal. `memory` is the peak in MB of the child and its
    descendants (`tasks.runtime.memory.Watch`). `exception` is the last one that it printed with a
    traceback, type and text, or "". `stopped` means that Ctrl-C was pressed and the
    child ended well nevertheless.
    """

    code: int
    memory: float
    last_lines: tuple[str, ...]
    exception: str
    stopped: bool


def run(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    *,
    inherited: int,
    on_progress: ProgressListener | None = None,
) -> Ended:
    """Run `command`, which writes to `folder`, and wait for its end.

    The child inherits the file descriptor `inherited`. `on_progress` is called about once a second.
    Raises KeyboardInterrupt when Ctrl-C stopped the child.
    """
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    variables: dict[str, str] = {"PYTHONUNBUFFERED": "1", "DIVE_PARENT": str(os.getpid())}
    if sys.stderr.isatty():
        variables |= {"DIVE_TERMINAL": "1", "COLUMNS": str(shutil.get_terminal_size().columns)}
    log = _Log(folder / LOG, secrets(os.environ))
    log.line(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %Z')} {shlex.join(command)}")
    direct = command[0] == sys.executable
    with _interrupts_ignored() if direct else nullcontext():
        child = subprocess.Popen(
            command,
            pass_fds=[inherited],
            env={**os.environ, **environment, **variables},
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
            reader.join(2)  # not for ever: a process that outlives the child may hold the pipe open
        log.close()
    child.returncode = code = os.waitstatus_to_exitcode(status)
    if presses and code != 0:
        raise KeyboardInterrupt
    memory = watch.peak
    if code != 0 or not memory:
        # Exact to the end, but of the child alone, and never below this process's own size.
        memory = max(memory, megabytes(usage.ru_maxrss))
    return Ended(code, memory, tuple(log.last), log.exception, bool(presses))


def secrets(environment: Any) -> list[bytes]:
    """The values of the variables that hold secrets, longest first."""
    values = {
        value.encode()
        for name, value in environment.items()
        if name.upper().endswith(SECRET) and len(value) >= 8
    }
    return sorted(values, key=len, reverse=True)


def progress(folder: Path) -> dict[str, Any]:
    """The figures of the child's progress bar (what, done, total, unit); {} where there are none."""
    try:
        figures = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


class Exceptions:
    """Finds the exceptions among a process's lines: the first line after a traceback's own lines."""

    def __init__(self) -> None:
        self.last = ""
        self._inside = False

    def read(self, line: str) -> None:
        """Take the next line. torchrun's own exception, that a process of its failed, is left out."""
        text = RANK.sub("", line)
        if text.endswith(TRACEBACK):  # a bar may stand before it
            self._inside = True
        elif self._inside and text and not text.startswith((" ", "+")) and not BAR.search(text):
            self._inside = False
            if not text.startswith("torch.distributed.elastic."):
                self.last = text


def last_words(lines: Iterable[str]) -> str:
    """The last of a process's lines that is no progress bar, but the exception after a traceback."""
    exceptions, last = Exceptions(), ""
    for line in lines:
        exceptions.read(line)
        last = last if BAR.search(line) or not line.strip() else line
    return exceptions.last or last


class _Log:
    """Copies the child's two streams to the terminal and, as whole lines, to one file."""

    def __init__(self, path: Path, hidden: list[bytes]):
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        # One a stream: a line of stdout between those of a traceback is no exception.
        self._exceptions = {stream: Exceptions() for stream in (1, 2)}
        self._hidden = hidden
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        with suppress(OSError):  # the stage itself reports a full disk
            self._file = path.open("ab", buffering=0)

    def copy(self, stream: IO[bytes], terminal: int) -> None:
        """Copy `stream` to the descriptor `terminal` and to the log, until the stream ends."""
        waiting, line = b"", b""
        while chunk := os.read(stream.fileno(), 1 << 16):
            waiting, rest = self._hide(waiting + chunk)
            with suppress(OSError):  # the terminal is gone
                os.write(terminal, waiting)
            *lines, line = (line + waiting).split(b"\n")
            for each in lines:
                self.line(_shown(each), terminal)
            line = line[line.rfind(b"\r", 0, -1) + 1 :][-(1 << 20) :]
            waiting = rest
        with suppress(OSError):
            os.write(terminal, waiting)
        if shown := _shown(line + waiting):
            self.line(shown, terminal)
        stream.close()

    @property
    def exception(self) -> str:
        """The last exception on stderr, or else on stdout; "" where there is none."""
        return self._exceptions[2].last or self._exceptions[1].last

    def line(self, text: str, stream: int = 1) -> None:
        """Write one line of a stream to the log, and keep it among the last lines."""
        with self._lock, suppress(OSError, ValueError):
            self.last.append(text)
            self._exceptions[stream].read(text)
            if self._file is not None:
                self._file.write(f"{text}\n".encode())

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _hide(self, text: bytes) -> tuple[bytes, bytes]:
        """`text` with secrets masked, and an end of it that may be the beginning of a secret."""
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
    """A line as a terminal shows it in the end, without what a progress bar overwrote."""
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace").rstrip()


def _follow(folder: Path, listener: ProgressListener, over: threading.Event) -> None:
    """Call `listener` for every change of the progress, and once more after the end."""
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
            with suppress(Exception):  # a scheduler that does not answer is no reason to stop
                listener(f"{now.get('what')}: {done:,}{of} {now.get('unit')}", percent)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start a child that ignores Ctrl-C from its first moment, also while it imports.

    A terminal sends Ctrl-C to every process; this process passes it on to the child itself.
    """
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
    """Ask the child to finish on the first Ctrl-C, and end it on the second; yield the presses.

    The child knows and prints what it finishes first (`tasks/runtime/interrupts.py`). Only the main
    thread receives Ctrl-C; in any other thread the child is left to itself.
    """
    presses: list[int] = []

    def on_press(*_: Any) -> None:
        presses.append(1)
        if len(presses) == 1:
            print("stopping; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            sys.excepthook = _without_interrupts
            # A launcher does not know SIGUSR1. On SIGTERM it ends its processes, which have
            # checkpoints to resume from.
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


def _without_interrupts(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print the traceback of any exception but KeyboardInterrupt."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
