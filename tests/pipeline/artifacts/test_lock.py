"""One builder at a time, on one machine and on several; locks left behind are told from held ones."""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time

import pytest

from pipeline.artifacts import lock
from pipeline.artifacts.lock import Busy, held, this_machine


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every hundredth of a second."""
    for name, value in {"LOOK": 0.01, "BEAT": 0.01, "STALE": 0.3, "SETTLE": 0.05}.items():
        monkeypatch.setattr(lock, name, value)


@pytest.fixture
def apart(monkeypatch, quick):
    """A file system that keeps kernel locks apart for each machine."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)


def left_behind(path, machine: str, **changed) -> None:
    record = {"machine": machine, "host": "b", "pid": 7, "nonce": "n"} | changed
    path.write_text(json.dumps(record))


def test_a_lock_names_its_owner_and_is_gone_afterwards(tmp_path):
    path = tmp_path / "x.lock"
    with held(path, 0) as ours:
        told = json.loads(path.read_text())
        assert (told["pid"], told["machine"]) == (os.getpid(), this_machine())
        assert ours.still_ours()
    assert list(tmp_path.iterdir()) == []


def test_a_held_lock_is_refused_naming_the_process(tmp_path):
    path = tmp_path / "x.lock"
    with held(path, 0), pytest.raises(Busy, match=rf"^process {os.getpid()}$"), held(path, 0):
        pass


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_at_once(tmp_path):
    path = tmp_path / "x.lock"
    left_behind(path, this_machine())
    with held(path, 0) as ours:
        assert ours.still_ours()


def test_who_waited_for_a_lock_that_was_removed_looks_again(tmp_path, quick):
    """The first lets go and removes the file; the waiting ones must not share what is left of it."""
    path = tmp_path / "x.lock"
    inside, most = [], []

    def work() -> None:
        with held(path, 30):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 8
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_lock_that_goes_while_one_looks_is_no_lock(tmp_path, monkeypatch):
    """The holder lets go between the moment the file is opened and the moment it is locked."""
    path = tmp_path / "x.lock"
    holder = contextlib.ExitStack()
    holder.enter_context(held(path, 0))
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", real)
        holder.close()
        real(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with held(path, 5) as ours:
        assert ours.still_ours(), "a third would find no file and make one of its own"


def test_a_living_lock_of_another_machine_is_not_taken(tmp_path, apart):
    path = tmp_path / "x.lock"
    with held(path, 0, machine="other") as theirs:
        with pytest.raises(Busy, match="on"), held(path, 0.5):
            pass
        assert theirs.still_ours()


def test_a_dead_lock_of_another_machine_is_taken_when_it_gave_no_sign_for_long(tmp_path, quick):
    path = tmp_path / "x.lock"
    left_behind(path, "other")
    started = time.monotonic()
    with held(path, 0) as ours:
        assert time.monotonic() - started >= lock.STALE
        assert ours.still_ours()


def test_clocks_of_machines_are_not_compared(tmp_path, quick):
    path = tmp_path / "x.lock"
    left_behind(path, "other")
    os.utime(path, (2**33, 2**33))  # two centuries ahead
    with held(path, 0) as ours:
        assert ours.still_ours()


def test_of_machines_that_find_a_dead_lock_together_one_gets_it(tmp_path, apart):
    path = tmp_path / "x.lock"
    left_behind(path, "gone")
    inside, most = [], []

    def work(machine: str) -> None:
        with held(path, 30, machine=machine):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    workers = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 4


def test_a_file_system_without_links_or_kernel_locks_has_locks_too(tmp_path, monkeypatch, quick):
    def refuse(*_):
        raise OSError(errno.EPERM, "no such thing here")

    monkeypatch.setattr(lock.os, "link", refuse)
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    path = tmp_path / "x.lock"
    with held(path, 0) as ours:
        assert ours.still_ours()
        with pytest.raises(Busy), held(path, 0.1):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_owner_learns_that_its_lock_was_taken_over(tmp_path):
    path = tmp_path / "x.lock"
    with held(path, 0) as ours:
        left_behind(path, "other", nonce="another")
        assert not ours.still_ours()
    assert path.exists(), "it is no longer ours to remove"


def test_a_child_that_inherits_the_descriptor_keeps_the_lock(tmp_path):
    path = tmp_path / "x.lock"
    with held(path, 0) as ours:
        kept = os.dup(ours.descriptor)
        left_behind(path, this_machine(), nonce=ours.nonce)
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(kept)
        os.close(other)
