"""Every image asked, shard by shard: what Propose and Evaluate share.

A Sampler holds the crew (`tasks/engines/pool.py`) that works off the shards; it is opened at the first
shard that is not there yet, and stays open between the tables of a stage. Figures on the way tell
early that a prompt is bad.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card
from tasks.engines import adapters
from tasks.engines.backends import custom
from tasks.engines.base import Sampling
from tasks.engines.pool import Crew, Inline, Processes
from tasks.engines.settings import BACKENDS, EngineSettings
from tasks.engines.worker import REFUSED, Ask, Done, Shard, refusals
from tasks.language import answers
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.progress import progress
from tasks.runtime.protocol import SCRATCH
from tasks.runtime.waiting import opening
from tasks.tables import schemas, shards


class Sampler:
    """Asks a policy `n` times, or once and greedily. Use it in a `with` statement.

    Draws depend on (seed, shard), so that a resumed run draws
    alike where the engine is repeatable.
    """

    def __init__(self, policy: Path, settings: EngineSettings, n: int, seed: int):
        self.policy, self.settings, self.n = policy, settings, n
        self._seed = seed
        self._crew: Crew | None = None
        self._stations: dict[str, Done] = {}
        self.answered = 0  # rollouts of this run
        self.seconds = 0.0  # during which shards were worked off, the engine's start left out

    def __enter__(self) -> "Sampler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._crew is not None:
            self._crew.close()

    def run(
        self,
        output: Path,
        table: str,
        asks: Sequence[Ask],
        download: Path,
        shard_size: int,
        desc: str,
        *,
        greedy: bool = False,
        tally: "Tally | None" = None,
    ) -> None:
        """Ask everything, and leave one file a shard; shards already there are left alone.

        `tally` is told of every shard, and its figures stand beside the progress bar. Images that
        the engine refuses are named in `<table>_refused.parquet`.
        """
        sampling = [self._sampling(i, greedy) for i in range(-(-len(asks) // shard_size))]
        if any(ask.choices for ask in asks):
            # One letter repeats nothing; a penalty would only push it away from the question's.
            sampling = [replace(each, repetition_penalty=1.0) for each in sampling]
        parts = [
            Shard(i, shards.shard_path(output, table, i), download, tuple(part), sampling[i])
            for i, part in enumerate(shards.chunks(list(asks), shard_size))
        ]
        todo = [part for part in parts if not part.path.exists()]
        by_number = {part.number: part for part in parts}
        finished = [part for part in parts if part.path.exists()]
        with progress(
            None,
            desc=desc,
            total=len(asks),
            unit="images",
            done=sum(len(part.asks) for part in finished),
        ) as bar:
            for part in finished:
                if tally:
                    tally.add(part.path)
            if tally and todo:
                tally.check()

            def on_done(done: Done) -> None:
                self._stations[done.station] = done
                self.answered += done.images * (1 if greedy else self.n)
                bar.update(done.images)
                if tally:
                    tally.add(by_number[done.shard].path)
                    bar.set_postfix(tally.live())
                    tally.check()

            if todo:
                policy = self._weights(output)
                self._crew = self._crew or open_crew(policy, self.settings)
                probe = _probe(todo, download)
                ready: list[float] = []
                with opening(desc, policy, self.settings.backend) as opened, shard_by_shard():

                    def on_ready() -> None:
                        opened()
                        ready.append(time.monotonic())

                    self._crew.run(todo, probe, on_ready, on_done)
                self.seconds += time.monotonic() - ready[0]
                if not all(part.path.exists() for part in todo):
                    stop_if_asked()
        _gather_refusals(output, table, parts)

    def figures(self) -> dict[str, Any]:
        """Seconds the engines worked, prompt tokens, and how many of them came from a cache."""
        counts: Counter[str] = Counter()
        for done in self._stations.values():
            counts.update(done.counts)
        busy = sum(done.busy for done in self._stations.values())
        return {"busy_seconds": round(busy, 1), "engines": len(self._stations), **counts}

    def _weights(self, output: Path) -> Path:
        """The policy with whole weights; a server has its own."""
        if self.settings.backend == "server":
            return self.policy
        return adapters.whole(self.policy, output / SCRATCH[-1])

    def _sampling(self, shard: int, greedy: bool) -> Sampling:
        return sampling_of(self.settings, self.n, self._seed, shard, greedy)


def sampling_of(
    settings: EngineSettings, n: int, seed: int, shard: int, greedy: bool = False
) -> Sampling:
    """How `[engine]` settings sample the requests of a shard: `n` times, or once and greedily."""
    return Sampling(
        n=1 if greedy else n,
        temperature=0.0 if greedy else settings.temperature,
        top_p=1.0 if greedy else settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        max_new_tokens=settings.max_new_tokens,
        seed=int(np.random.default_rng([seed, shard, greedy]).integers(2**31)),
    )


def open_crew(policy: Path, settings: EngineSettings) -> Crew:
    """The crew for `[engine] backend`. Your own engines work in this process.

    Unless they have an attribute `isolated`, as an engine should that may die.
    """
    backend = settings.backend
    if backend == "ray":
        from tasks.engines.ray_pool import RayCrew

        return RayCrew(policy, settings)
    if backend not in BACKENDS and not getattr(custom(backend), "isolated", False):
        return Inline(policy, settings)
    return Processes(policy, settings)


class Tally:
    """What has been sampled so far: counts, Pass@1 and Pass@N; `labels` are class ids by image."""

    def __init__(self, labels: dict[str, int], card: Card, fail_fast: float = 1.0):
        self._labels = labels
        self._names = ClassNames(card.classes, card.aliases)
        self._fail_fast = fail_fast
        self._reasons: Counter[str] = Counter()
        self._images = self._rollouts = self._right = self._with_one_right = 0
        self._tokens = self._unparsed = self._shards = 0
        self._example = ""

    def add(self, path: Path) -> None:
        """Count a shard of rollouts."""
        self._shards += 1
        columns = ["image_id", "completion", "finish_reason", "num_tokens"]
        hits: Counter[str] = Counter()
        for row in shards.read_file(path, columns).to_pylist():
            self._reasons[row["finish_reason"]] += 1
            self._tokens += row["num_tokens"]
            self._rollouts += 1
            key = row["image_id"]
            answer = answers.parse(row["completion"]).answer
            right = answer is not None and self._names.match(answer).class_id == self._labels[key]
            hits[key] += right
            if answer is None:
                self._unparsed += 1
                self._example = self._example or row["completion"][:200]
        # A shard holds all rollouts of its images.
        self._images += len(hits)
        self._right += hits.total()
        self._with_one_right += sum(count > 0 for count in hits.values())

    def check(self) -> None:
        """Raises StageError once two shards are there and too many answers cannot be read."""
        share = self._unparsed / max(1, self._rollouts)
        if self._shards >= 2 and share > self._fail_fast:
            raise StageError(
                f"{share:.0%} of the first {self._rollouts} answers cannot be read (more than "
                f"[Propose] fail_fast_unparsed_share = {self._fail_fast:g}); one is {self._example!r}"
            )

    def live(self) -> dict[str, str]:
        """What stands beside the progress bar."""
        total = max(1, self._rollouts)
        once, all_of = self._passed()
        return {
            "unparsed": f"{self._unparsed / total:.0%}",
            "cut": f"{self._reasons['length'] / total:.0%}",
            "pass@1": f"{once:.2f}",
            f"pass@{self._n()}": f"{all_of:.2f}",
        }

    def stats(self) -> dict[str, Any]:
        """The counts, for the artifact."""
        once, all_of = self._passed()
        return {
            "images": self._images,
            "rollouts": self._rollouts,
            "tokens": self._tokens,
            "finish_reasons": dict(sorted(self._reasons.items())),
            "refused": self._reasons[REFUSED] // max(1, self._n()),
            "unparsed": self._unparsed,
            "example_unparsed": self._example,
            "pass_at_1": once,
            "pass_at_n": all_of,
        }

    def _n(self) -> int:
        return self._rollouts // max(1, self._images)

    def _passed(self) -> tuple[float, float]:
        """Pass@1 and Pass@N; of all N rollouts of an image both are plain shares."""
        return (
            self._right / max(1, self._rollouts),
            self._with_one_right / max(1, self._images),
        )


def throughput(stats: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
    """Counts of a tally with what the run itself took. A resumed run speaks of its own part."""
    figures = sampler.figures()
    seconds = round(sampler.seconds, 1)
    rate = round(sampler.answered / seconds, 2) if seconds else None
    cached = figures.get("cached_tokens", 0) / max(1, figures.get("prompt_tokens", 0))
    own = {"seconds": seconds, "rollouts_per_second": rate, "cached_share": round(cached, 4)}
    return {**stats, **own, **figures}


def _probe(todo: Sequence[Shard], download: Path) -> Shard:
    """The longest text with the largest image, greedily: if this fits, everything does."""
    asks = [ask for shard in todo for ask in shard.asks]
    longest = max(asks, key=lambda ask: len(ask.before) + len(ask.text))
    sizes = shards.read(download, "images", ["image_id", "width", "height"])
    areas = dict(
        zip(
            sizes["image_id"].to_pylist(),
            (np.asarray(sizes["width"]).astype(int) * np.asarray(sizes["height"])).tolist(),
            strict=True,
        )
    )
    if lost := sorted({ask.image_id for ask in asks} - areas.keys()):
        raise StageError(f"{len(lost)} images are not in {download}, the first: {lost[0]}")
    largest = max(asks, key=lambda ask: areas[ask.image_id])
    first = todo[0]
    probe = longest._replace(image_id=largest.image_id)
    return Shard(first.number, first.path, download, (probe,), first.sampling)


def _gather_refusals(output: Path, table: str, parts: Sequence[Shard]) -> None:
    """The reasons of all shards in one table; no file when nothing was refused."""
    gathered = output / f"{table}_refused.parquet"
    found = [path for part in parts if (path := refusals(part.path)).exists()]
    # What a run that was cut off here has gathered already is kept.
    sources = [*([gathered] if gathered.exists() else []), *found]
    reasons = {
        row["image_id"]: row["reason"]
        for path in sources
        for row in shards.read_file(path).to_pylist()
    }
    rows = [{"image_id": key, "reason": reasons[key]} for key in sorted(reasons)]
    shards.write(gathered, rows, schemas.refused())
    for path in found:
        path.unlink()


def refused_first(output: Path, table: str, count: int = 10) -> str:
    """The first refused images with their reasons, as one text."""
    path = output / f"{table}_refused.parquet"
    rows = shards.read_file(path).to_pylist()[:count] if path.exists() else []
    return "; ".join(f"{row['image_id']}: {row['reason']}" for row in rows)
