"""Worker pools: spread shards over engines, and restart the workers whose engine died.

When an engine dies, only its process ends. A new process retries the shard, the last time with half
the batch, and then the stage fails. A shard's file has a fixed name: it is written once or not at all.
"""

import itertools
import os
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from data_cards import CardError
from tasks.engines import fork_server
from tasks.engines.backends import open_engine
from tasks.engines.base import EngineDied
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Shard, ShardReport, Worker, halved
from tasks.runtime import memory
from tasks.runtime.command import quiet_libraries
from tasks.runtime.errors import ShardError, StageError
from tasks.runtime.interrupts import end_with_parent, stop_asked
from tasks.runtime.machine import gpus

Ready = Callable[[], None]
OnDone = Callable[[ShardReport], None]
ATTEMPTS = 3  # tries of one shard, and tries to start an engine
CPU_ENGINE = 3 * 2**30  # bytes of an engine's process on a CPU, without weights and cache, measured
DIED = 70  # exit code of a worker process that reported the death of its engine


class WorkerPool(Protocol):
    """The interface of all pools.

    `run` answers the shards of `todo`. It first has the engines check `probe`, the longest of all
    prompts, and calls `on_ready` when an engine is ready and `on_done` for each shard on disk.
    """

    def run(
        self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone
    ) -> None: ...

    def close(self) -> None: ...


class InProcessPool:
    """A pool of one worker, in this process."""

    def __init__(self, policy: Path, settings: EngineSettings):
        self._worker = Worker(lambda: open_engine(policy, settings))

    def run(self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone) -> None:
        """Check `probe`, then answer all shards of `todo`."""
        self._worker.check(probe)
        on_ready()
        self._worker.work(until_stopped(todo), on_done)

    def close(self) -> None:
        """Close the engine."""
        self._worker.close()


class ProcessPool:
    """One worker process per device, all fed from one queue. Processes that die are replaced."""

    def __init__(self, policy: Path, settings: EngineSettings):
        self._policy, self._settings = policy, settings
        self._devices = device_groups(settings, policy)
        self._context = fork_server.context(settings, self._devices)
        self._workers: list[_WorkerProcess] = []
        self._deaths: Counter[Path] = Counter()
        self._starts = 0

    def run(self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone) -> None:
        """Check `probe` in every process, then answer all shards of `todo`.

        Raises StageError when engines died on one shard ATTEMPTS times, or when no engine starts.
        """
        queue = deque(todo)
        while len(self._workers) < min(len(self._devices), len(todo)):
            self._start(self._devices[len(self._workers)], self._settings)
        for worker in self._workers:
            worker.send(("check", probe))
        while queue or any(worker.assigned for worker in self._workers):
            if stop_asked():
                queue.clear()  # shards that are assigned already are finished
            for worker in self._workers:
                # Near the end a worker holds no spare shard that another could begin at once.
                depth = worker.slots + 1 if len(queue) > 2 * len(self._workers) else 1
                while queue and worker.ready and len(worker.assigned) < depth:
                    # A shard that an engine died on runs alone, so that a second death is its own.
                    alone = queue[0].path in self._deaths
                    if worker.assigned and (alone or worker.holds(self._deaths)):
                        break
                    worker.assign(queue.popleft())
            # With a timeout: an engine's child can hold the pipe of a dead process open.
            wait([end for w in self._workers for end in (w.connection, w.process.sentinel)], 1.0)
            for worker in list(self._workers):
                # Checked before the messages are read, so that the last ones are not lost.
                alive = worker.process.is_alive()
                for kind, value in worker.messages():
                    if kind == "error":
                        raise StageError(value)
                    if kind == "ready":
                        worker.ready, worker.slots, self._starts = True, value, 0
                        on_ready()
                    if kind == "done":
                        worker.finish(value)
                        on_done(value)
                if not alive:
                    self._replace(worker, queue, probe)

    def close(self) -> None:
        """End all processes, busy ones too."""
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._context.get_start_method() == "forkserver":
            fork_server.stop()

    def _start(self, device: str, settings: EngineSettings) -> "_WorkerProcess":
        self._starts += 1
        worker = _WorkerProcess(self._context, self._policy, settings, device)
        self._workers.append(worker)
        return worker

    def _replace(self, worker: "_WorkerProcess", queue: deque[Shard], probe: Shard) -> None:
        """Put the shards of a dead worker back into the queue, and start another worker."""
        how = _exit_reason(worker.process.exitcode)
        self._workers.remove(worker)
        worker.kill_group()
        suspects = list(worker.assigned.values())[: worker.slots]
        for shard in reversed(list(worker.assigned.values())):
            queue.appendleft(shard)
        settings = self._settings
        for shard in reversed(suspects):
            self._deaths[shard.path] += 1
            if self._deaths[shard.path] == ATTEMPTS:
                raise StageError(
                    f"the engine died {ATTEMPTS} times on shard {shard.number} ({how}), the last time "
                    f"with half the batch; {self._advice()}, or look at its images, "
                    f"{shard.queries[0].image_id} to {shard.queries[-1].image_id}"
                )
            if self._deaths[shard.path] == ATTEMPTS - 1:
                queue.remove(shard)
                queue.appendleft(halved(shard))
                fewer = max(1, settings.max_num_seqs // 2)
                settings = replace(settings, max_num_seqs=fewer)
        if not worker.ready and self._starts >= ATTEMPTS:
            raise StageError(f"the engine does not start ({how}); see its messages above")
        print(f"the engine ended ({how}); a fresh one goes on", file=sys.stderr)
        self._start(worker.device, settings).send(("check", probe))

    def _advice(self) -> str:
        if self._settings.backend == "server":
            return "look at the server's own messages"
        return "lower [engine] max_num_seqs or gpu_memory_utilization"


class _WorkerProcess:
    """A process that runs one worker, and the shards that are assigned to it."""

    def __init__(self, context: Any, policy: Path, settings: EngineSettings, device: str):
        self.device, self.ready, self.slots = device, False, 1
        self.assigned: dict[int, Shard] = {}  # by shard number, in the order of assignment
        self.connection, theirs = context.Pipe()
        arguments = (theirs, policy, settings, device, os.getpid())
        self.process = context.Process(target=_serve, args=arguments)
        fork_server.start(self.process)
        theirs.close()

    def assign(self, shard: Shard) -> None:
        self.assigned[shard.number] = shard
        self.send(("shard", shard))

    def holds(self, paths: Container[Path]) -> bool:
        """Whether an assigned shard is among `paths`."""
        return any(shard.path in paths for shard in self.assigned.values())

    def finish(self, report: ShardReport) -> None:
        del self.assigned[report.shard]

    def send(self, message: tuple[str, Any]) -> None:
        with suppress(
            BrokenPipeError, ConnectionResetError
        ):  # `run` notices its end by the sentinel
            self.connection.send(message)

    def messages(self) -> Iterator[tuple[str, Any]]:
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, ConnectionResetError):
            return

    def end(self) -> None:
        """End the process and all that it started. An idle process may close its engine first."""
        self.send(("end", None))
        self.process.join(15 if self.ready and not self.assigned else 0.1)
        self.kill_group()

    def kill_group(self) -> None:
        """Kill its process group, since an engine's own process would keep the GPU's memory."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        if self.process.is_alive():  # it had no group of its own yet
            self.process.kill()
        self.process.join()
        self.connection.close()


def until_stopped(todo: Iterable[Shard]) -> Iterator[Shard]:
    """The shards in turn, up to the moment at which the run is asked to stop."""
    return itertools.takewhile(lambda _: not stop_asked(), todo)


def device_groups(settings: EngineSettings, policy: Path) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker process; "" where there is no GPU.

    Raises StageError when there are fewer GPUs than `tensor_parallel_size`.
    """
    count = settings.processes
    if settings.backend == "server":
        return [""] * (count or 1)
    each = settings.tensor_parallel_size
    names = gpus()
    groups = [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]
    if names and not groups:
        raise StageError(f"[engine] tensor_parallel_size = {each}, but there are {len(names)} GPUs")
    return groups[: count or None] or [""] * (count or _cpu_engines(settings, policy))


def _cpu_engines(settings: EngineSettings, policy: Path) -> int:
    """The number of engines for a machine without a GPU: as many as cores and free memory allow."""
    cores = len(os.sched_getaffinity(0))
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))  # [run] cpu_threads
    weights = sum(file.stat().st_size for file in policy.glob("*.safetensors"))
    # Files of 16 bits are twice as large in float32.
    memory_each = CPU_ENGINE + settings.cpu_kv_cache_gib * 2**30 + 2 * weights
    return max(1, min(cores // threads, int(memory.available() // memory_each)))


def _serve(
    connection: Connection, policy: Path, settings: EngineSettings, device: str, parent: int
) -> None:
    """The main function of a worker process: check the probe, then answer shards until the end."""
    os.setpgid(0, 0)  # so that the parent can kill the processes that the engine starts
    os.environ["DIVE_PARENT"] = str(parent)
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    end_with_parent(group=True)
    quiet_libraries()
    worker = Worker(lambda: open_engine(policy, settings))
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:  # one thread reports shards, another the check
            connection.send((kind, value))

    def source() -> Iterator[Shard]:
        while (message := connection.recv())[0] != "end":
            if message[0] == "check":
                worker.check(message[1])
                send("ready", worker.slots)
            else:
                yield message[1]

    try:
        todo = source()
        first = next(todo, None)  # here, so that the main thread opens the engine
        if first is not None:
            worker.work(itertools.chain([first], todo), lambda report: send("done", report))
        worker.close()
    except (StageError, CardError, ShardError) as error:
        send("error", str(error))
    except (EngineDied, MemoryError) as error:
        print(f"{type(error).__name__}: {error}"[:2000], file=sys.stderr, flush=True)
        os._exit(DIED)
    except EOFError:
        pass  # the parent process has ended
    except BaseException:  # a bug: an ordinary exit would wait for the engine's own process
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    return "it gave up, see above" if code == DIED else f"exit code {code}"
