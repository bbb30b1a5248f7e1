"""Stations put to work: in this process, in one process per device, or in its restarted successor.

An engine that dies takes its process with it and nothing else: the shard is tried again in a fresh
process, then in half the batch, and then the stage says so. A shard is a file with one name, so
whatever happens it is there once or not at all.
"""

import itertools
import multiprocessing
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
from tasks.engines.backends import open_engine
from tasks.engines.base import EngineDied
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Done, Shard, Station, halved
from tasks.runtime.command import quiet_libraries
from tasks.runtime.errors import ShardError, StageError
from tasks.runtime.interrupts import end_with_parent, stop_asked
from tasks.runtime.machine import gpus

Ready = Callable[[], None]
OnDone = Callable[[Done], None]
ATTEMPTS = 3  # of one shard, and of starting an engine
DIED = 70  # exit code of a process whose engine died but could still say so


class Crew(Protocol):
    """Whoever works off shards.

    `on_ready` is called when an engine is ready, `on_done` for each shard that is on disk.
    """

    def run(
        self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone
    ) -> None: ...

    def close(self) -> None: ...


class Inline:
    """One station in this process."""

    def __init__(self, policy: Path, settings: EngineSettings):
        self._station = Station(lambda: open_engine(policy, settings))

    def run(self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone) -> None:
        """Work off `todo`, after a check of `probe`, the longest of all prompts."""
        self._station.check(probe)
        on_ready()
        self._station.work(until_stopped(todo), on_done)

    def close(self) -> None:
        """End the engine."""
        self._station.close()


class Processes:
    """One process per device, all fed from one queue; the dead are replaced."""

    def __init__(self, policy: Path, settings: EngineSettings):
        self._policy, self._settings = policy, settings
        self._devices = devices(settings)
        self._workers: list[_Worker] = []
        self._deaths: Counter[Path] = Counter()
        self._starts = 0

    def run(self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone) -> None:
        """Work off `todo`, after a check of `probe`, the longest of all prompts.

        Raises StageError when a shard killed its engine three times, or no engine starts.
        """
        queue = deque(todo)
        while len(self._workers) < min(len(self._devices), len(todo)):
            self._hire(self._devices[len(self._workers)], self._settings)
        for worker in self._workers:
            worker.send(("check", probe))
        while queue or any(worker.assigned for worker in self._workers):
            if stop_asked():
                queue.clear()  # what is being worked on is finished
            for worker in self._workers:
                # Near the end nobody gets work for later that another could begin at once.
                depth = worker.slots + 1 if len(queue) > 2 * len(self._workers) else 1
                while queue and worker.ready and len(worker.assigned) < depth:
                    # A shard that an engine died on is worked off alone: then it is plain which.
                    alone = queue[0].path in self._deaths
                    if worker.assigned and (alone or worker.holds(self._deaths)):
                        break
                    worker.give(queue.popleft())
            # With a limit, for a process that an engine's own child holds open ends unnoticed.
            wait([end for w in self._workers for end in (w.connection, w.process.sentinel)], 1.0)
            for worker in list(self._workers):
                alive = worker.process.is_alive()  # asked first: its last words come before its end
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
        """End all processes, those that are busy too."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _hire(self, device: str, settings: EngineSettings) -> "_Worker":
        self._starts += 1
        worker = _Worker(self._policy, settings, device)
        self._workers.append(worker)
        return worker

    def _replace(self, worker: "_Worker", queue: deque[Shard], probe: Shard) -> None:
        """Take back the shards of a dead worker, and hire another."""
        how = _death(worker.process.exitcode)
        self._workers.remove(worker)
        worker.sweep()
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
                    f"{shard.asks[0].image_id} to {shard.asks[-1].image_id}"
                )
            if self._deaths[shard.path] == ATTEMPTS - 1:
                queue.remove(shard)
                queue.appendleft(halved(shard))
                fewer = max(1, settings.max_num_seqs // 2)
                settings = replace(settings, max_num_seqs=fewer)
        if not worker.ready and self._starts >= ATTEMPTS:
            raise StageError(f"the engine does not start ({how}); see its messages above")
        print(f"the engine ended ({how}); a fresh one goes on", file=sys.stderr)
        self._hire(worker.device, settings).send(("check", probe))

    def _advice(self) -> str:
        if self._settings.backend == "server":
            return "look at the server's own messages"
        return "lower [engine] max_num_seqs or gpu_memory_utilization"


class _Worker:
    """One process with one station, and the shards it has been given."""

    def __init__(self, policy: Path, settings: EngineSettings, device: str):
        context = multiprocessing.get_context("spawn")
        self.device, self.ready, self.slots = device, False, 1
        self.assigned: dict[int, Shard] = {}  # by shard number, in the order given
        self.connection, theirs = context.Pipe()
        arguments = (theirs, policy, settings, device, os.getpid())
        self.process = context.Process(target=_serve, args=arguments)
        self.process.start()
        theirs.close()

    def give(self, shard: Shard) -> None:
        self.assigned[shard.number] = shard
        self.send(("shard", shard))

    def holds(self, paths: Container[Path]) -> bool:
        """Whether one of its shards is among these."""
        return any(shard.path in paths for shard in self.assigned.values())

    def finish(self, done: Done) -> None:
        del self.assigned[done.shard]

    def send(self, message: tuple[str, Any]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its sentinel tells of its end
            self.connection.send(message)

    def messages(self) -> Iterator[tuple[str, Any]]:
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, ConnectionResetError):
            return

    def end(self) -> None:
        """End it, gently if it is idle, with whatever it started."""
        self.send(("end", None))
        self.process.join(15 if self.ready and not self.assigned else 0.1)
        self.sweep()

    def sweep(self) -> None:
        """Kill what is left of its process group: an engine beside it would keep the GPU's memory."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        if self.process.is_alive():  # before it had a group of its own
            self.process.kill()
        self.process.join()
        self.connection.close()


def until_stopped(todo: Iterable[Shard]) -> Iterator[Shard]:
    """The shards in turn, none after the run was asked to stop."""
    return itertools.takewhile(lambda _: not stop_asked(), todo)


def devices(settings: EngineSettings) -> list[str]:
    """What each process sees of the machine's GPUs (CUDA_VISIBLE_DEVICES); one "" without any."""
    count = settings.processes
    if settings.backend == "server":
        return [""] * (count or 1)
    each = settings.tensor_parallel_size
    found = gpus()
    groups = [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]
    if found and not groups:
        raise StageError(f"[engine] tensor_parallel_size = {each}, but there are {len(found)} GPUs")
    return (groups or [""] * (count or 1))[: count or None]


def _serve(
    connection: Connection, policy: Path, settings: EngineSettings, device: str, parent: int
) -> None:
    """A worker's life: check, say so, then one shard after another."""
    os.setpgid(0, 0)  # what it starts is ended with it
    os.environ["DIVE_PARENT"] = str(parent)
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    end_with_parent(group=True)
    quiet_libraries()
    station = Station(lambda: open_engine(policy, settings))
    lock = threading.Lock()

    def tell(kind: str, value: Any) -> None:
        with lock:  # shards are reported by one thread, checks by another
            connection.send((kind, value))

    def source() -> Iterator[Shard]:
        while (message := connection.recv())[0] != "end":
            if message[0] == "check":
                station.check(message[1])
                tell("ready", station.slots)
            else:
                yield message[1]

    try:
        given = source()
        first = next(given, None)  # here, so that the engine is opened in the main thread
        if first is not None:
            station.work(itertools.chain([first], given), lambda done: tell("done", done))
        station.close()
    except (StageError, CardError, ShardError) as error:
        tell("error", str(error))
    except (EngineDied, MemoryError) as error:
        print(f"{type(error).__name__}: {error}"[:2000], file=sys.stderr, flush=True)
        os._exit(DIED)
    except EOFError:
        pass  # the parent has gone
    except BaseException:  # a bug: at its ordinary end Python would wait for the engine beside it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    return "it gave up, see above" if code == DIED else f"exit code {code}"
