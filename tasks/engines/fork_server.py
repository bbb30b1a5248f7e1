"""The process from which several engines on a CPU are forked: it imports vLLM once for all of them.

It is multiprocessing's fork server, which imports this module before its first fork. It ends when the
process that started it is gone.
"""

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from tasks.engines import vllm
from tasks.engines.base import quiet_start
from tasks.engines.settings import EngineSettings
from tasks.runtime.command import importing, quiet_libraries
from tasks.runtime.errors import StageError

PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def context(settings: EngineSettings, devices: Sequence[str]) -> ForkServerContext | SpawnContext:
    """How the processes of engines start: forked, where several on a CPU share vLLM's imports.

    The first process that is forked waits for the imports. On a GPU each process is a fresh one,
    since vLLM reads the devices while it is imported.
    """
    if settings.backend != "vllm" or any(devices) or len(devices) < 2:
        return multiprocessing.get_context("spawn")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([__name__])
    return forked


def start(process: BaseProcess) -> None:
    """Start a process of a `context`, with a fresh server where the last one has ended.

    Raises StageError when the server ends while it imports.
    """
    try:
        try:
            process.start()
        except ConnectionRefusedError:  # the server is ending, and has not ended yet
            stop()
            process.start()
    except (EOFError, ConnectionError) as error:
        raise StageError(
            "the process that imports vLLM for all engines has died while it imported; see its messages "
            "above, or set [engine] processes = 1, which does without it"
        ) from error


def stop() -> None:
    """End the server at once, if this process has started one. Its forked processes live on."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)  # it may be importing still
        server._stop()


def _preload() -> None:
    """Import vLLM, without a thread, since a process with threads must not fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    _kill_on_death_of_parent(signal.SIGKILL)
    quiet_libraries()
    # An engine's process imports again what failed here, and tells the error.
    with quiet_start(), suppress(Exception):
        _import_vllm()
    # From here on the server itself waits for its parent's end.
    _kill_on_death_of_parent(0)


def _kill_on_death_of_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends; 0: none.

    A handler of Python's would wait until a library is loaded, which takes seconds on a slow disk.
    Other systems than Linux have no such call: there the server ends once it has imported.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _import_vllm() -> None:
    vllm.before_import_on_a_cpu()
    with importing():
        from transformers import AutoProcessor  # noqa: F401
        from vllm import LLM  # noqa: F401

        importlib.import_module("vllm.v1.worker.cpu_worker")  # it is imported as an engine starts


def _is_preloaded() -> bool:
    """Whether this process is a fork server that was told to import this module before its first fork."""
    code = "from multiprocessing.forkserver import"
    return any(part.startswith(code) and repr(__name__) in part for part in sys.orig_argv)


if _is_preloaded():
    _preload()
