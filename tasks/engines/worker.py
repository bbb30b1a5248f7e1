"""A worker: feeds shards of requests to one engine, and writes the answers to disk.

A worker answers as many shards at once as its engine has slots. While the engine generates, the
worker reads and decodes the images of the next shards.
"""

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import Any, NamedTuple

from tasks.engines import refusals
from tasks.engines.base import (
    Completion,
    Engine,
    Request,
    Sampling,
    rollout_row,
)
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.ids import Ids
from tasks.tables.pixels import Decoder

AHEAD = 2  # shards whose images are prefetched while the engine generates
# Pixels of a shard that are decoded ahead, at 3 bytes each: 250 pictures of 0.4 megapixels. The
# engine decodes the other pictures when it needs them.
DECODED = 100_000_000


class Query(NamedTuple):
    """One image and the user text about it. `before` is the text that precedes the image.

    With `choices` the answer must be one of these texts.
    """

    image_id: str
    text: str
    before: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SameQuestion(Sequence[Query]):
    """One question about many images: a sequence of queries, of which none is held in memory.

    A slice is another SameQuestion. Other processes get it with its ids alone.
    """

    image_ids: Ids
    text: str
    before: str = ""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, image_ids=self.image_ids[index])
        return Query(self.image_ids[index], self.text, self.before)

    def __iter__(self) -> Iterator[Query]:
        return (Query(image_id, self.text, self.before) for image_id in self.image_ids)


@dataclass(frozen=True)
class Shard:
    """The queries whose answers go into one file. The engine gets them in `pieces` batches.

    With `enough`, the samples of an image come in instalments, until it has enough of them.
    """

    number: int
    path: Path
    download: Path
    queries: Sequence[Query]
    sampling: Sampling
    pieces: int = 1
    enough: refusals.Enough | None = None


@dataclass(frozen=True)
class ShardReport:
    """A worker's report on one finished shard.

    `busy` (seconds in which the engine generated) and `counts` (tokens by kind) are the worker's
    totals since it started.
    """

    worker: str
    shard: int
    images: int
    refused: int
    busy: float
    counts: dict[str, int]


class Worker:
    """Runs one engine on shards. The engine stays open between calls of `work`."""

    def __init__(self, open_engine: Callable[[], Engine]):
        self._open = open_engine
        self._engine: Engine | None = None
        self._stores: dict[Path, shards.ImageStore] = {}
        self._clock = BusyClock()
        self._name = f"{platform.node()}/{os.getpid()}/{id(self)}"

    @property
    def engine(self) -> Engine:
        """The engine. The first access opens it."""
        if self._engine is None:
            self._engine = self._open()
        return self._engine

    @property
    def slots(self) -> int:
        """How many shards the engine takes at once."""
        return getattr(self.engine, "slots", 1)

    def check(self, shard: Shard) -> None:
        """Check the shard's first request whose image the engine takes.

        Raises StageError when the engine cannot answer it, or refuses all images.
        """
        if shard.queries[0].choices and not getattr(self.engine, "constrained", False):
            raise StageError(
                f"the engine {type(self.engine).__name__} cannot keep answers to given letters; leave "
                "constrained out of [Evaluate] modes, or use backend vllm, server or transformers"
            )
        if reason := refusals.check_prompt(self.engine, self._requests(shard)):
            raise StageError(
                f"the engine refuses the {len(shard.queries)} largest images: {reason}"
            )

    def work(self, source: Iterable[Shard], report: Callable[[ShardReport], None]) -> None:
        """Answer and write every shard of `source`, and call `report` for each one on disk.

        A slot takes a new shard only when its last one is on disk. So a killed process loses at
        most one shard a slot, at the price of some milliseconds a shard.
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
                    on_answered = partial(_post, events, "answered")
                    shard, requests = waiting.popleft()
                    askers.submit(self._answer, shard, requests).add_done_callback(on_answered)
                kind, value = events.get()
                if kind == "failed":
                    raise value
                if kind == "ready":
                    waiting.append(value)
                elif kind == "answered":
                    on_written = partial(_post, events, "written")
                    writer.submit(self._write, report, *value).add_done_callback(on_written)
                elif kind == "written":
                    active -= 1
                ended = ended or kind == "end"
        while not events.empty():
            kind, value = events.get()
            if kind == "failed":
                raise value

    def close(self) -> None:
        """Close the engine, if it is open."""
        if self._engine is not None and hasattr(self._engine, "close"):
            self._engine.close()
        self._engine = None

    def _prepare(self, source: Iterable[Shard], room: Semaphore, events: Any) -> None:
        try:
            for shard in source:
                room.acquire()
                events.put(("ready", (shard, self._requests(shard))))
            events.put(("end", None))
        except BaseException as error:  # `work` raises it in its own thread
            events.put(("failed", error))

    def _requests(self, shard: Shard) -> list[Request]:
        store = self._stores.setdefault(shard.download, shards.ImageStore(shard.download))
        images = store.read([query.image_id for query in shard.queries])
        decode = getattr(self.engine, "decode", None)
        budget = DECODED if getattr(self.engine, "pictures", True) else 0
        requests = []
        for image_id, text, before, choices in shard.queries:
            data = images[image_id]
            request = Request(image_id, data, text, before, choices, decode or Decoder())
            if budget > 0:
                with suppress(Exception):  # the engine will fail on it too, and refuse it by name
                    budget -= request.picture.width * request.picture.height
                    request = request.without_bytes() if decode else request
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
                for answer in refusals.generate_in_instalments(
                    self.engine,
                    part,
                    refusals.reseeded(shard.sampling, number),
                    refused,
                    shard.enough,
                )
            ]
        if len(refused) == len(requests) > 1:
            reason = next(iter(refused.values()))
            raise StageError(f"the engine refuses every image of shard {shard.number}: {reason}")
        return shard, requests, answers, refused

    def _write(
        self,
        report: Callable[[ShardReport], None],
        shard: Shard,
        requests: list[Request],
        answers: list[list[Completion]],
        refused: dict[str, str],
    ) -> None:
        rows = [
            rollout_row(request.key, number, completion)
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
            ShardReport(
                self._name, shard.number, len(requests), len(refused), self._clock.seconds, counts
            )
        )

    @staticmethod
    def _save(shard: Shard, rows: list[dict[str, Any]], refused: dict[str, str]) -> None:
        refusals.write(shard.path, refused)
        shards.write(shard.path, rows, schemas.rollouts())


class BusyClock:
    """Counts the seconds in which at least one thread was inside its `with` statement."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """The seconds so far, including the stretch that is under way."""
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


def halved(shard: Shard) -> Shard:
    """The shard in twice as many batches, for a retry after its engine died."""
    return replace(shard, pieces=2 * shard.pieces)


def _post(events: Any, kind: str, future: Future[Any]) -> None:
    error = future.exception()
    events.put(("failed", error) if error else (kind, future.result()))
