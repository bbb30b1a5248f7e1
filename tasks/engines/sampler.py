"""Samples answers about a stage's images, shard by shard, for Propose and Evaluate.

A Sampler holds a worker pool (`tasks/engines/pool.py`). It opens the pool at the first shard that
is not on disk, and keeps it open between the tables of a stage. Figures beside the progress bar show
a bad prompt early.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card
from tasks.engines import adapters, refusals
from tasks.engines.backends import custom
from tasks.engines.base import Sampling
from tasks.engines.pool import InProcessPool, ProcessPool, WorkerPool
from tasks.engines.settings import BACKENDS, EngineSettings
from tasks.engines.worker import Query, Shard, ShardReport
from tasks.language import answers
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.progress import progress
from tasks.runtime.protocol import SCRATCH
from tasks.runtime.waiting import opening
from tasks.tables import shards
from tasks.tables.ids import hashes

PROBES = 8  # images that an engine is checked with, until it takes one


class Sampler:
    """Asks a policy about images, `n` times or once and greedily. Use it in a `with` statement.

    The seed of a shard follows from (seed, shard number), so a resumed run samples the same
    answers where the engine is repeatable.
    """

    def __init__(self, policy: Path, settings: EngineSettings, n: int, seed: int):
        self.policy, self.settings, self.n = policy, settings, n
        self._seed = seed
        self._pool: WorkerPool | None = None
        self._reports: dict[str, ShardReport] = {}
        self.answered = 0  # rollouts of this run
        self.seconds = 0.0  # spent on shards, without the engines' start

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.close()

    def run(
        self,
        output: Path,
        table: str,
        queries: Sequence[Query],
        download: Path,
        shard_size: int,
        desc: str,
        *,
        greedy: bool = False,
        statistics: "RolloutStatistics | None" = None,
        enough: refusals.Enough | None = None,
    ) -> None:
        """Answer all queries and write one file a shard. Shards on disk already are kept.

        With `enough`, an image is asked in instalments, and up to n times.

        `statistics` counts every shard, and its figures stand beside the progress bar. The images
        that the engine refused are written to `<table>_refused.parquet`, with the reasons.
        """
        sampling = [self._sampling(i, greedy) for i in range(-(-len(queries) // shard_size))]
        parts = [
            Shard(
                i,
                shards.shard_path(output, table, i),
                download,
                part,
                sampling[i],
                enough=enough.only([query.image_id for query in part]) if enough else None,
            )
            for i, part in enumerate(shards.chunks(queries, shard_size))
        ]
        todo = [part for part in parts if not part.path.exists()]
        by_number = {part.number: part for part in parts}
        finished = [part for part in parts if part.path.exists()]
        with progress(
            None,
            desc=desc,
            total=len(queries),
            unit="images",
            done=sum(len(part.queries) for part in finished),
        ) as bar:
            for part in finished:
                if statistics:
                    statistics.add(part.path)
            if statistics and todo:
                statistics.check()

            def on_done(report: ShardReport) -> None:
                self._reports[report.worker] = report
                self.answered += shards.num_rows(by_number[report.shard].path)
                bar.update(report.images)
                if statistics:
                    statistics.add(by_number[report.shard].path)
                    bar.set_postfix(statistics.progress())
                    statistics.check()

            if todo:
                policy = self._weights(output)
                self._pool = self._pool or open_pool(policy, self.settings)
                probe = _probe(todo, download)
                ready: list[float] = []
                with opening(desc, policy, self.settings.backend) as opened, shard_by_shard():

                    def on_ready() -> None:
                        opened()
                        ready.append(time.monotonic())

                    self._pool.run(todo, probe, on_ready, on_done)
                self.seconds += time.monotonic() - ready[0]
                if not all(part.path.exists() for part in todo):
                    stop_if_asked()
        refusals.gather(output, table, [part.path for part in parts])
        if some := refusals.first(output, table, 3):
            print(f"{desc}: the engine refuses images, as {table}_refused.parquet lists: {some}")

    def figures(self) -> dict[str, Any]:
        """Seconds in which engines generated, prompt tokens, and those that came from a cache."""
        counts: Counter[str] = Counter()
        for report in self._reports.values():
            counts.update(report.counts)
        busy = sum(report.busy for report in self._reports.values())
        return {"busy_seconds": round(busy, 1), "engines": len(self._reports), **counts}

    def _weights(self, output: Path) -> Path:
        """The folder with the policy's full weights. A server has loaded its own."""
        if self.settings.backend == "server":
            return self.policy
        return adapters.merged_weights(self.policy, output / SCRATCH[-1])

    def _sampling(self, shard: int, greedy: bool) -> Sampling:
        return sampling_of(self.settings, self.n, self._seed, shard, greedy)


def sampling_of(
    settings: EngineSettings, n: int, seed: int, shard: int, greedy: bool = False
) -> Sampling:
    """The sampling parameters of a shard under `[engine]`: `n` samples, or one greedy answer.

    `temperature`, `top_p` and `repetition_penalty` are for samples. A greedy answer has no penalty:
    a question's prompt holds the options and their letters, and a penalty would push away from them.
    """
    return Sampling(
        n=1 if greedy else n,
        temperature=0.0 if greedy else settings.temperature,
        top_p=1.0 if greedy else settings.top_p,
        repetition_penalty=1.0 if greedy else settings.repetition_penalty,
        max_new_tokens=settings.max_new_tokens,
        seed=int(np.random.default_rng([seed, shard, greedy]).integers(2**31)),
    )


def open_pool(policy: Path, settings: EngineSettings) -> WorkerPool:
    """The worker pool for `[engine] backend`.

    An engine of your own runs in this process. If it can die, set its attribute `isolated` to True,
    and it runs in processes of its own.
    """
    backend = settings.backend
    if backend == "ray":
        from tasks.engines.ray_pool import RayPool

        return RayPool(policy, settings)
    if backend not in BACKENDS and not getattr(custom(backend), "isolated", False):
        return InProcessPool(policy, settings)
    return ProcessPool(policy, settings)


class RolloutStatistics:
    """Counts the rollouts sampled so far, and their Pass@1 and Pass@N.

    `labels` are class ids by image id. `fail_fast` is the largest share of unparsed answers.
    """

    def __init__(self, labels: Mapping[str, int], card: Card, fail_fast: float = 1.0):
        self._labels = labels
        self._names = ClassNames.of(card)
        self._fail_fast = fail_fast
        self._reasons: Counter[str] = Counter()
        self._images = self._rollouts = self._solved = self._refused = 0
        self._tokens = self._unparsed = self._shards = self._n = 0
        self._shares = 0.0  # summed over images: the share of rollouts that name the truth
        self._example = ""

    def add(self, path: Path) -> None:
        """Count a shard of rollouts."""
        self._shards += 1
        columns = ["image_id", "completion", "finish_reason", "num_tokens"]
        hits: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        truth: dict[str, int] = {}
        refused = set()
        for row in shards.read_file(path, columns).to_pylist():
            self._reasons[row["finish_reason"]] += 1
            self._tokens += row["num_tokens"]
            self._rollouts += 1
            key = row["image_id"]
            answer = answers.parse(row["completion"]).answer
            if key not in truth:
                truth[key] = self._labels[key]
            correct = answer is not None and self._names.match(answer).class_id == truth[key]
            hits[key] += correct
            asked[key] += 1
            if row["finish_reason"] == refusals.REFUSED:
                refused.add(key)
            if answer is None:
                self._unparsed += 1
                self._example = self._example or row["completion"][:200]
        # A shard holds all rollouts of its images.
        self._images += len(hits)
        self._refused += len(refused)
        self._n = max([self._n, *asked.values()])
        self._shares += sum(hits[key] / count for key, count in asked.items())
        self._solved += sum(count > 0 for count in hits.values())

    def check(self) -> None:
        """Raises StageError when, after two shards or more, too many answers are unparsed."""
        share = self._unparsed / max(1, self._rollouts)
        if self._shards >= 2 and share > self._fail_fast:
            raise StageError(
                f"{share:.0%} of the first {self._rollouts} answers cannot be read (more than "
                f"[Propose] fail_fast_unparsed_share = {self._fail_fast:g}); one is {self._example!r}"
            )

    def progress(self) -> dict[str, str]:
        """The figures beside the progress bar."""
        total = max(1, self._rollouts)
        once, all_of = self._passed()
        return {
            "unparsed": f"{self._unparsed / total:.0%}",
            "cut": f"{self._reasons['length'] / total:.0%}",
            "pass@1": f"{once:.2f}",
            f"pass@{self._n}": f"{all_of:.2f}",
        }

    def values(self) -> dict[str, Any]:
        """The counts, for stats.json."""
        once, all_of = self._passed()
        return {
            "images": self._images,
            "rollouts": self._rollouts,
            "tokens": self._tokens,
            "finish_reasons": dict(sorted(self._reasons.items())),
            "refused": self._refused,
            "unparsed": self._unparsed,
            "example_unparsed": self._example,
            "pass_at_1": once,
            "pass_at_n": all_of,
        }

    def _passed(self) -> tuple[float, float]:
        """Pass@1 and Pass@N, as means over images, of which some may have fewer rollouts."""
        images = max(1, self._images)
        return self._shares / images, self._solved / images


def throughput(stats: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
    """The counts with this run's own seconds and rates. A resumed run leaves out earlier runs."""
    figures = sampler.figures()
    seconds = round(sampler.seconds, 1)
    rate = round(sampler.answered / seconds, 2) if seconds else None
    cached = figures.get("cached_tokens", 0) / max(1, figures.get("prompt_tokens", 0))
    own = {"seconds": seconds, "rollouts_per_second": rate, "cached_share": round(cached, 4)}
    return {**stats, **own, **figures}


def _probe(todo: Sequence[Shard], download: Path) -> Shard:
    """The longest text with the largest images: an engine is checked with the first that it takes."""
    queries = (query for shard in todo for query in shard.queries)
    longest = max(queries, key=lambda query: len(query.before) + len(query.text))
    hashed = np.concatenate([hashes(query.image_id for query in shard.queries) for shard in todo])
    largest, unknown = shards.largest_images(download, hashed, PROBES)
    if unknown:
        asked = (query.image_id for shard in todo for query in shard.queries)
        raise shards.lost_images(
            download, [image_id for image_id in asked if int(hashes([image_id])[0]) in unknown]
        )
    shard = todo[0]
    probes = tuple(longest._replace(image_id=image_id) for image_id in largest)
    return Shard(shard.number, shard.path, download, probes, shard.sampling)
