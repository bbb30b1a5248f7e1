"""A lock file that lets one process at a time build an artifact, also over several machines.

On one machine the kernel's lock (flock) shows exactly whether the holder lives: the kernel drops it
when the process and the child that inherited it are gone. Some shared file systems keep that lock
apart for each machine. So the lock file also names its owner, who touches it every BEAT seconds. A
lock of another machine counts as abandoned when nobody has touched it for STALE seconds of the
waiting process's own clock. Clocks of different machines are never compared.

filelock's SoftFileLease (4.2) does the second half alone. It asks whether the process that took the
lease lives: when a run is killed, a second one takes the lease within a hundredth of a second, while
the child of the first still writes into the folder. It also takes the lease of a process on this
machine that is suspended for longer than the lease. Its kernel lock (FileLock) names no owner and
passes its descriptor to no child. Hence a lock of our own.
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

PATIENCE = 5.0  # seconds in which the child of a killed run notices and releases the lock
LOOK = 0.1  # seconds between two tries to take a lock that another process holds
BEAT = 5.0  # seconds between two touches of a lock by its owner
STALE = 60.0  # seconds without a touch after which a lock counts as abandoned
SETTLE = 2.0  # seconds; longer than another machine needs to see what was written
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)  # no hard links here


class Busy(Exception):
    """Another process holds the lock; the message names it."""


@dataclass
class Lock:
    """A lock that this process holds. The child that does the work may inherit `descriptor`."""

    path: Path
    descriptor: int
    nonce: str
    _ended: threading.Event = field(default_factory=threading.Event)

    def still_ours(self) -> bool:
        """Whether we still own the lock: another machine may have taken it as abandoned."""
        return _read(self.path).get("nonce") == self.nonce

    def beat(self) -> None:
        """Touch the lock file every BEAT seconds, until the lock is released."""
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the stage itself reports a full or vanished disk
                os.utime(self.descriptor)

    def release(self) -> None:
        """Delete the lock file, then drop the kernel's lock: no file is ever seen without a lock."""
        self._ended.set()
        if self.still_ours():
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


@contextmanager
def held(path: Path, patience: float, machine: str = "") -> Iterator[Lock]:
    """Hold the lock file `path` inside a `with` statement.

    Waits `patience` seconds for another holder. It waits longer only to find out whether a holder
    on another machine still lives. Raises Busy naming the holder, and OSError when the lock file
    cannot be written.
    """
    machine = machine or this_machine()
    deadline = time.monotonic() + patience
    seen = _Observed()
    while (lock := _take(path, machine, seen)) is None:
        now = time.monotonic()
        if now > deadline and not seen.undecided(now):
            raise Busy(_named(seen.owner))
        if now > deadline and seen.first_report():
            print(f"waiting up to {STALE:.0f} s to see whether {_named(seen.owner)} lives", file=sys.stderr)  # fmt: skip
        time.sleep(LOOK)
    threading.Thread(target=lock.beat, daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()


def holder(path: Path) -> str:
    """The holder of the lock, in words; empty when nobody holds it. Looks once and takes nothing.

    A lock of another machine counts as held: to find out whether its owner lives takes longer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    except OSError:  # no permission to read it
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
    """A name of this machine that no other machine has, and that changes with each boot."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}"
    return f"{platform.node()}/{uuid.getnode():x}"


class _Observed:
    """What a waiting process has observed of the lock's owner, by its own clock."""

    def __init__(self) -> None:
        self.owner: dict[str, Any] = {}
        self._sign: Any = None
        self._since = 0.0
        self._signs = 0
        self._foreign = self._reported = False

    def look(self, owner: dict[str, Any], touched: int, foreign: bool) -> None:
        """Record the owner, the lock file's time stamp in ns, and whether another machine owns it."""
        sign = (owner.get("nonce"), touched)
        if sign != self._sign:
            self._sign, self._since = sign, time.monotonic()
            self._signs += 1
        self.owner, self._foreign = owner, foreign

    def abandoned(self) -> bool:
        """Whether nobody has touched the lock file for STALE seconds."""
        return self._signs > 0 and time.monotonic() - self._since > STALE

    def undecided(self, now: float) -> bool:
        """Whether waiting longer would show if an owner on another machine still lives."""
        return self._foreign and self._signs == 1 and now - self._since <= STALE + SETTLE + 1

    def first_report(self) -> bool:
        """True at the first call: the user is told once that this process waits."""
        before, self._reported = self._reported, True
        return not before


def _take(path: Path, machine: str, seen: _Observed) -> Lock | None:
    """Take the lock. Returns None while another process holds it."""
    nonce = uuid.uuid4().hex
    record = {"machine": machine, "host": platform.node(), "pid": os.getpid(), "nonce": nonce}
    if not path.exists() and (descriptor := _create(path, record)) is not None:
        return Lock(path, descriptor, nonce)
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # released just now
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
        except OSError:  # a file system without flock: the owner's touches decide
            dead = False
        if not _is(path, descriptor):  # released, and perhaps taken by a third, meanwhile
            os.close(descriptor)
            return None
        if not dead:
            seen.look(owner, os.fstat(descriptor).st_mtime_ns, True)
            if not seen.abandoned():
                os.close(descriptor)
                return None
        text = json.dumps(record).encode()
        os.pwrite(descriptor, text.ljust(512), 0)
        os.ftruncate(descriptor, max(512, len(text)))
        if not dead:  # another waiting machine may have written too: the last writer has the lock
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
    """Create a lock file that is locked and complete before it gets its name.

    Returns its descriptor, or None if there is a lock file by now.
    """
    fresh = path.with_name(f".{path.name}-{record['nonce']}")
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(descriptor, json.dumps(record).encode().ljust(512))
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(fresh, path)
    except (FileExistsError, FileNotFoundError):  # another process was first, or deleted `fresh`
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
    """The same on a file system without hard links.

    Until its text is written the lock names no owner, and counts as another machine's.
    """
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
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the file that `descriptor` has open."""
    try:
        named, opened = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _named(owner: dict[str, Any]) -> str:
    """The lock holder as a message names it: its process id, and its host where that is another."""
    host = "" if owner.get("machine") == this_machine() else f" on {owner.get('host', 'unknown')}"
    return f"process {owner.get('pid', 'unknown')}{host}"
