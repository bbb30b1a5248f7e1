"""The server that engines are forked from goes with the run that started it, however that ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest

from tasks.engines import fork_server
from tasks.engines.pool import ProcessPool
from tasks.runtime.errors import StageError
from tests.conftest import ROOT
from tests.engines.conftest import SETTINGS

pytestmark = pytest.mark.process
START = """
import time
from multiprocessing import forkserver
from tasks.engines import fork_server
from tests.engines.conftest import SETTINGS
fork_server.context(SETTINGS, ["", ""])
forkserver.ensure_running()
print(forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(600)
"""
# A child that holds Python's lock, as the loading of a large library from a slow disk does.
LOADING = """
import subprocess, sys, time
child = '''
import ctypes, os, signal
from tasks.engines import fork_server
fork_server._kill_on_death_of_parent(signal.SIGKILL)
print(os.getpid(), flush=True)
ctypes.PyDLL(None).sleep(60)
'''
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""
# A program with a fork server of its own, whose processes use our engines.
HOST = """
import multiprocessing, os, signal, sys

def use(told):
    before = signal.getsignal(signal.SIGINT)
    import tasks.engines.pool
    told.put("vllm" in sys.modules or signal.getsignal(signal.SIGINT) != before)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    told = context.Queue()
    context.Process(target=use, args=(told,)).start()
    print(0 if told.get() else os.getpid(), flush=True)
"""
# A forked process as an engine's is, of a server that has nothing to import.
FORK = """
import multiprocessing, os, time
from tasks.runtime.interrupts import end_with_parent

def serve(parent):
    os.setpgid(0, 0)
    os.environ["DIVE_PARENT"] = str(parent)
    end_with_parent(group=True)
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tasks"])
    context.Process(target=serve, args=(os.getpid(),)).start()
    time.sleep(600)
"""


def soon(reached: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.05)
    return reached()


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as ended."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


@contextmanager
def started(folder: Path, code: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A script, and the number of the process that it printed. It is killed at the end."""
    (folder / "started.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "started.py"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as script:
        try:
            assert script.stdout
            yield script, int(script.stdout.readline())
        finally:
            script.kill()


def test_a_server_that_is_importing_ends_with_the_run(tmp_path):
    with started(tmp_path, START) as (run, server):
        maps = Path(f"/proc/{server}/maps")
        assert soon(lambda: "torch" in maps.read_text(), 120), "it imports"
        run.kill()
        assert soon(lambda: gone(server), 4), "and it would import on for seconds"


def test_a_server_that_is_loading_a_library_ends_with_the_run(tmp_path):
    with started(tmp_path, LOADING) as (run, server):
        run.kill()
        assert soon(lambda: gone(server), 10)


def test_a_forked_process_ends_with_a_run_that_nobody_waits_for(tmp_path):
    with started(tmp_path, FORK) as (run, forked):
        run.kill()  # it stays in the process table, as with a careless init process of a container
        assert soon(lambda: gone(forked), 10)
        assert Path(f"/proc/{run.pid}").exists()


def test_a_fork_server_of_another_program_imports_nothing_for_us(tmp_path):
    with started(tmp_path, HOST) as (program, printed):
        assert printed == program.pid


def test_a_pool_that_forks_no_engine_leaves_that_server(monkeypatch):
    calls = []
    monkeypatch.setattr(fork_server, "stop", lambda: calls.append(1))
    for processes in (1, 2):
        ProcessPool(Path("policy"), replace(SETTINGS, processes=processes)).close()
    assert len(calls) == 1, "only the pool of two forks"


def test_a_server_that_dies_is_one_sentence():
    context = fork_server.context(SETTINGS, ["", ""])
    forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_pid
    threading.Timer(0.5, os.kill, (server, signal.SIGKILL)).start()
    with pytest.raises(StageError, match=r"process that imports vLLM .* processes = 1"):
        fork_server.start(context.Process(target=print))
    fork_server.stop()


def test_a_server_that_has_not_quite_ended_yet_is_replaced(monkeypatch):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([])
    forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGKILL)
    assert soon(lambda: gone(server), 10)
    ended, looks = os.waitpid, [(0, 0)]  # the first look finds it alive
    monkeypatch.setattr(os, "waitpid", lambda *of: looks.pop() if looks else ended(*of))
    process = context.Process(target=print)
    fork_server.start(process)
    process.join()
    assert process.exitcode == 0
    assert forkserver._forkserver._forkserver_pid != server
    fork_server.stop()


def test_a_server_is_stopped_while_it_imports():
    fork_server.context(SETTINGS, ["", ""])
    forkserver.ensure_running()
    server = forkserver._forkserver._forkserver_pid
    began = time.monotonic()
    fork_server.stop()
    assert time.monotonic() - began < 2
    assert gone(server)
    fork_server.stop()


@pytest.mark.parametrize(
    ("changed", "devices", "method"),
    [
        ({}, ["", ""], "forkserver"),
        ({}, [""], "spawn"),
        ({}, ["0", "1"], "spawn"),
        ({"backend": "transformers"}, ["", ""], "spawn"),
        ({"backend": "tests.fakes:isolated"}, ["", ""], "spawn"),
    ],
)
def test_only_several_engines_of_vllm_on_a_cpu_are_forked(changed, devices, method):
    assert fork_server.context(replace(SETTINGS, **changed), devices).get_start_method() == method
