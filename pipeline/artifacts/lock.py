"""One builder of an artifact at a time, on one machine or on several that share its folder.

On one machine the kernel's lock (flock) says exactly whether the holder lives: it goes when the
process and the child that inherited it are gone. Some shared file systems keep that lock apart for
each machine. So the lock file also names its owner, who touches it every `BEAT` seconds; a lock of
another machine counts as left behind when nobody has touched it for `STALE` seconds of the
watcher's own clock. Clocks of different machines are never compared, and may jump.

filelock's SoftFileLease (4.2) does the second half alone. It asks whether the process that took the
lease lives: when a run is killed, a second one takes the lease within a hundredth of a second, while
the child of the first still writes into the folder. It also takes the lease of a process on this
machine that is suspended for longer than the lease. Its kernel lock (FileLock) names no owner and
hands its descriptor to no child. Hence a lock of our own.
"""

import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 5.0  # seconds in which the child of a killed run notices and lets go
LOOK = 0.1  # seconds between two looks at a lock that another holds
BEAT = 5.0
STALE = 60.0
SETTLE = 2.0  # longer than another machine needs to see what was written
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Busy(Exception):
    """Somebody else holds the lock; the message says who."""


@dataclass
class Lock:
    """A lock that is held. `descriptor` may be inherited by the child that does the work."""

    path: Path
    descriptor: int
    nonce: str
    _ended: threading.Event = field(default_factory=threading.Event)

    def still_ours(self) -> bool:
        """False when another machine took it over, having seen no sign of life for so long."""
        return _read(self.path).get("nonce") == self.nonce

    def beat(self) -> None:
        """Show that the owner lives, until the lock is let go."""
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a full or vanished disk is the stage's business
                os.utime(self.descriptor)

    def release(self) -> None:
        """Let go; the file goes first, so that nobody finds it without its lock."""
        self._ended.set()
        if self.still_ours():
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


@contextmanager
def held(path: Path, patience: float, machine: str = "") -> Iterator[Lock]:
    """Hold the lock `path`. Waits `patience` seconds for another holder, and longer only to learn
    whether a holder on another machine still lives.

    Raises Busy naming the holder, and OSError when the lock cannot be written.
    """
    machine = machine or this_machine()
    deadline = time.monotonic() + patience
    seen = _Seen()
    while (lock := _take(path, machine, seen)) is None:
        now = time.monotonic()
        if now > deadline and not seen.undecided(now):
            raise Busy(_named(seen.owner))
        if now > deadline and seen.tell():
            print(f"waiting up to {STALE:.0f} s to see whether {_named(seen.owner)} lives", file=sys.stderr)  # fmt: skip
        time.sleep(LOOK)
    threading.Thread(target=lock.beat, daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()


def holder(path: Path) -> str:
    """Who holds the lock, by one look that disturbs nobody; empty when nobody does.

    A lock of another machine counts as held: whether its owner lives would take longer to tell.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    except OSError:  # not ours to read
        return "another user's process"
    try:
        owner = _read(path)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "" if owner.get("machine") == this_machine() else _named(owner)
    except OSError:  # held, or a file system without such locks
        return _named(owner)
    finally:
        os.close(descriptor)


def this_machine() -> str:
    """A name that no other machine has, and this one has until it is started again."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}"
    return f"{platform.node()}/{uuid.getnode():x}"


class _Seen:
    """What a waiting process has seen of the owner, by its own clock."""

    def __init__(self) -> None:
        self.owner: dict[str, Any] = {}
        self._sign: Any = None
        self._since = 0.0
        self._signs = 0
        self._foreign = self._told = False

    def look(self, owner: dict[str, Any], touched: int, foreign: bool) -> None:
        """Note the owner, and when it last gave a new sign of life."""
        sign = (owner.get("nonce"), touched)
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()
            self._signs += 1
        self.owner, self._foreign = owner, foreign

    def left_behind(self) -> bool:
        return self._signs > 0 and time.monotonic() - self._since > STALE

    def undecided(self, now: float) -> bool:
        """Whether waiting longer would tell: another machine, of which no sign of life was seen."""
        return self._foreign and self._signs == 1 and now - self._since <= STALE + SETTLE + 1

    def tell(self) -> bool:
        told, self._told = self._told, True
        return not told


def _take(path: Path, machine: str, seen: _Seen) -> Lock | None:
    """The lock, or None while another holds it."""
    nonce = uuid.uuid4().hex
    record = {"machine": machine, "host": platform.node(), "pid": os.getpid(), "nonce": nonce}
    if not path.exists() and (descriptor := _create(path, record)) is not None:
        return Lock(path, descriptor, nonce)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # let go just now
        return None
    owner = _read(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead = owner.get("machine") == machine
        except BlockingIOError:
            seen.look(owner, os.fstat(descriptor).st_mtime_ns, owner.get("machine") != machine)
            os.close(descriptor)
            return None
        except OSError:  # a file system without such locks: the owner's signs of life decide
            dead = False
        if not _is(path, descriptor):  # let go, and perhaps taken by a third, while we looked
            os.close(descriptor)
            return None
        if not dead:
            seen.look(owner, os.fstat(descriptor).st_mtime_ns, True)
            if not seen.left_behind():
                os.close(descriptor)
                return None
        text = json.dumps(record).encode()
        os.pwrite(descriptor, text.ljust(512), 0)
        os.ftruncate(descriptor, max(512, len(text)))
        if not dead:  # another waiting machine may have written too: the last one has it
            time.sleep(SETTLE)
            if _read(path).get("nonce") != nonce:
                os.close(descriptor)
                return None
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    return Lock(path, descriptor, nonce)


def _create(path: Path, record: dict[str, Any]) -> int | None:
    """A new lock file, locked and complete before it can be seen; None if there is one by now."""
    fresh = path.with_name(f".{path.name}-{record['nonce']}")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, json.dumps(record).encode().ljust(512))
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(fresh, path)
    except (FileExistsError, FileNotFoundError):  # or swept away by the one who was first
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_LINKS:
            raise
        return _create_plainly(path, record)
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        fresh.unlink(missing_ok=True)
    for stray in path.parent.glob(f".{path.name}-*"):  # of a process killed just above
        stray.unlink(missing_ok=True)
    return descriptor


def _create_plainly(path: Path, record: dict[str, Any]) -> int | None:
    """The same where files have one name only. Until it is written the lock has no owner, and
    counts as that of another machine."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, json.dumps(record).encode().ljust(512))
    return descriptor


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is(path: Path, descriptor: int) -> bool:
    try:
        there, ours = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _named(owner: dict[str, Any]) -> str:
    where = "" if owner.get("machine") == this_machine() else f" on {owner.get('host', 'unknown')}"
    return f"process {owner.get('pid', 'unknown')}{where}"
