"""What goes on around one engine: images ready before it needs them, shards written after it.

A station works off shards one after another (as many at once as its engine has slots). While the
engine works on one, the images of the next are read and decoded. A request that the engine refuses is found by halving its batch.
"""

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import Any, NamedTuple

from tasks.engines.base import (
    Completion,
    Engine,
    EngineDied,
    Request,
    Sampling,
    as_rollout,
    storable,
)
from tasks.runtime.errors import StageError, first_line
from tasks.tables import schemas, shards
from tasks.tables.pixels import Decoder

AHEAD = 2  # shards whose images are ready while the engine works on another
# Pixels of a shard decoded ahead, at 3 bytes each: 250 pictures of the 0.4 megapixels that a policy
# may be trained with. What is beyond them is decoded when it is needed.
DECODED = 100_000_000
REFUSED = "refused"  # finish reason of an image that the engine would not take


class Ask(NamedTuple):
    """One image and what is asked about it; `before` is text that stands before the image.

    With `choices` the answer must be one of these texts.
    """

    image_id: str
    text: str
    before: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shard:
    """One file to write: who is asked what. `pieces` is in how many batches the engine gets it."""

    number: int
    path: Path
    download: Path
    asks: tuple[Ask, ...]
    sampling: Sampling
    pieces: int = 1


@dataclass(frozen=True)
class Done:
    """One shard as it was worked off.

    `busy` and `counts` are the totals of its station so far: seconds at work, tokens by kind.
    """

    station: str
    shard: int
    images: int
    refused: int
    busy: float
    counts: dict[str, int]


class Station:
    """One engine at work. `work` may be called again; the engine stays open."""

    def __init__(self, open_engine: Callable[[], Engine]):
        self._open = open_engine
        self._engine: Engine | None = None
        self._stores: dict[Path, shards.ImageStore] = {}
        self._clock = BusyClock()
        self._name = f"{platform.node()}/{os.getpid()}/{id(self)}"

    @property
    def engine(self) -> Engine:
        """The engine, opened when it is first needed."""
        if self._engine is None:
            self._engine = self._open()
        return self._engine

    @property
    def slots(self) -> int:
        """How many shards the engine takes at once."""
        return getattr(self.engine, "slots", 1)

    def check(self, shard: Shard) -> None:
        """Raises StageError when the shard's first request cannot work: see Engine.check."""
        if shard.asks[0].choices and not getattr(self.engine, "constrained", False):
            raise StageError(
                f"the engine {type(self.engine).__name__} cannot keep answers to given letters; leave "
                "constrained out of [Evaluate] modes, or use backend vllm, server or transformers"
            )
        check = getattr(self.engine, "check", None)
        if check:
            check(self._requests(shard)[0])

    def work(self, source: Iterable[Shard], report: Callable[[Done], None]) -> None:
        """Answer and write every shard of `source`; `report` is told of each that is on disk.

        A slot is free again when its shard is on disk and not before: a process that is killed has
        no more than its slots to do again, for some milliseconds a shard.
        """
        events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        room = Semaphore(AHEAD)
        slots, waiting, active, ended = self.slots, deque[Any](), 0, False
        Thread(target=self._prepare, args=(source, room, events), daemon=True).start()
        with ThreadPoolExecutor(slots) as askers, ThreadPoolExecutor(1) as writer:
            while not (ended and not waiting and not active):
                while waiting and active < slots:
                    room.release()
                    active += 1
                    told = partial(_tell, events, "answered")
                    shard, requests = waiting.popleft()
                    askers.submit(self._answer, shard, requests).add_done_callback(told)
                kind, value = events.get()
                if kind == "failed":
                    raise value
                if kind == "ready":
                    waiting.append(value)
                elif kind == "answered":
                    told = partial(_tell, events, "written")
                    writer.submit(self._write, report, *value).add_done_callback(told)
                elif kind == "written":
                    active -= 1
                ended = ended or kind == "end"
        while not events.empty():
            kind, value = events.get()
            if kind == "failed":
                raise value

    def close(self) -> None:
        """End the engine, if it was opened."""
        if self._engine is not None and hasattr(self._engine, "close"):
            self._engine.close()
        self._engine = None

    def _prepare(self, source: Iterable[Shard], room: Semaphore, events: Any) -> None:
        try:
            for shard in source:
                room.acquire()
                events.put(("ready", (shard, self._requests(shard))))
            events.put(("end", None))
        except BaseException as error:  # raised where the events are read
            events.put(("failed", error))

    def _requests(self, shard: Shard) -> list[Request]:
        store = self._stores.setdefault(shard.download, shards.ImageStore(shard.download))
        images = store.read([ask.image_id for ask in shard.asks])
        own = getattr(self.engine, "decode", None)
        budget = DECODED if getattr(self.engine, "pictures", True) else 0
        requests = []
        for image_id, text, before, choices in shard.asks:
            request = Request(image_id, images[image_id], text, before, choices, own or Decoder())
            if budget > 0:
                with suppress(Exception):  # the engine will meet it, and it will be named there
                    budget -= request.picture.width * request.picture.height
                    request = request.without_bytes() if own else request
            requests.append(request)
        return requests

    def _answer(self, shard: Shard, requests: list[Request]) -> tuple[Any, ...]:
        refused: dict[str, str] = {}
        with self._clock:
            answers = [
                answer
                for number, part in enumerate(
                    shards.chunks(requests, -(-len(requests) // shard.pieces))
                )
                for answer in ask(self.engine, part, _other(shard.sampling, number), refused)
            ]
        if len(refused) == len(requests) > 1:
            reason = next(iter(refused.values()))
            raise StageError(f"the engine refuses every image of shard {shard.number}: {reason}")
        return shard, requests, answers, refused

    def _write(
        self,
        report: Callable[[Done], None],
        shard: Shard,
        requests: list[Request],
        answers: list[list[Completion]],
        refused: dict[str, str],
    ) -> None:
        rows = [
            as_rollout(request.key, number, completion)
            for request, completions in zip(requests, answers, strict=True)
            for number, completion in enumerate(completions)
        ]
        try:
            self._save(shard, rows, refused)
        except OSError as error:
            raise StageError(
                f"{shard.path} cannot be written: {error.strerror or error}; make room and run again"
            ) from error
        counts = dict(getattr(self.engine, "counts", {}))
        report(
            Done(self._name, shard.number, len(requests), len(refused), self._clock.seconds, counts)
        )

    @staticmethod
    def _save(shard: Shard, rows: list[dict[str, Any]], refused: dict[str, str]) -> None:
        reasons = [{"image_id": key, "reason": storable(reason)} for key, reason in refused.items()]
        refusals(shard.path).unlink(missing_ok=True)  # of an earlier attempt at this shard
        shards.write(refusals(shard.path), reasons, schemas.refused())
        shards.write(shard.path, rows, schemas.rollouts())


class BusyClock:
    """Seconds during which at least one thread was inside the `with` statement."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """So far, an unfinished stretch included."""
        with self._lock:
            return self._total + (time.perf_counter() - self._since if self._inside else 0.0)

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._total += time.perf_counter() - self._since


def ask(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, refused: dict[str, str]
) -> list[list[Completion]]:
    """Completions of every request; those that the engine refuses are named in `refused`.

    A refused image has its `n` rollouts as well, empty ones, so that it is never lost from a count.
    """
    try:
        answers = engine.generate(requests, sampling)
        if [len(row) for row in answers] != [sampling.n] * len(requests):
            raise StageError(
                f"the engine gave {sum(map(len, answers))} answers to {len(requests)} images asked for "
                f"{sampling.n} each; a server must support n > 1"
            )
        return answers
    except (StageError, EngineDied, MemoryError):
        raise
    except Exception as error:
        if len(requests) == 1:
            refused[requests[0].key] = first_line(error)
            return [[Completion("", REFUSED, 0, 0.0)] * sampling.n]
        half = len(requests) // 2
        return [
            answer
            for number, part in enumerate((requests[:half], requests[half:]))
            for answer in ask(engine, part, _other(sampling, number * half), refused)
        ]


def refusals(path: Path) -> Path:
    """Where the reasons stand for which images of a shard were refused."""
    return path.with_name(f"refused-{path.name}")


def _other(sampling: Sampling, number: int) -> Sampling:
    """The same for the first batch of a shard; another seed for each that follows."""
    return replace(sampling, seed=(sampling.seed + 7919 * number) % 2**31)


def halved(shard: Shard) -> Shard:
    """The same shard in twice as many batches, for an engine that died on it."""
    return replace(shard, pieces=2 * shard.pieces)


def _tell(events: Any, kind: str, future: Future[Any]) -> None:
    error = future.exception()
    events.put(("failed", error) if error else (kind, future.result()))
