"""Propose: N rollouts per training image from a policy, raw, into Parquet.

    python -m tasks.propose CONFIG.json

The expensive stage, so nothing is interpreted here: each completion is stored as it came, shard by
shard, and a killed run goes on from its last finished shard. What the answers mean is BuildMCQ's
business and can be changed without a GPU. Figures on the way (unparsed share, Pass@1 and Pass@N)
only tell early that a prompt is bad.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data_cards import Card, load
from tasks import answers, prompts, schemas, shards
from tasks.engine import Completion, Engine, Request, Sampling, as_rollout, open_engine
from tasks.labels import ClassNames
from tasks.metrics import pass_at_k
from tasks.run import StageError, main, progress


def propose(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    policy: Path,
    engine: dict[str, Any],
    num_rollouts: int,
    prompt: str,
    shard_size: int,
    max_unparsed_share: float,
    seed: int,
) -> None:
    """Sample `num_rollouts` answers for every base-class train image.

    Writes `rollouts-*.parquet` (num_rollouts rows an image, in image order) and `stats.json`.
    Raises StageError when more than `max_unparsed_share` of the answers cannot be read, since
    questions built from them would be made of noise.
    """
    data_card = load(card)
    rows = select(split, "train", ("base",))
    names = [data_card.classes[label] for label in sorted({row["label"] for row in rows})]
    text = question(data_card, engine["prompt_style"], prompt, names)
    sampler = Sampler(lambda: open_engine(policy, engine), engine, num_rollouts, seed)
    started = time.monotonic()
    run_shards(output, "rollouts", rows, download, lambda _: text, sampler, shard_size, "propose")
    stats = describe(output, "rollouts", {row["image_id"]: row["label"] for row in rows}, data_card)
    stats["seconds"] = round(time.monotonic() - started, 1)
    if stats["unparsed"] > max_unparsed_share * stats["rollouts"]:
        raise StageError(
            f"{stats['unparsed']} of {stats['rollouts']} answers cannot be read (more than "
            f"[Propose] max_unparsed_share = {max_unparsed_share:g}); the first one is "
            f"{stats['example_unparsed']!r}; look at the rollouts in {output}"
        )
    (output / "stats.json").write_text(json.dumps(stats, indent=1), encoding="utf-8")
    print(
        f"propose: {stats['rollouts']} rollouts of {len(rows)} images, Pass@1 "
        f"{stats['pass_at_1']:.3f}, Pass@{num_rollouts} {stats['pass_at_n']:.3f}, "
        f"{stats['unparsed']} unparsed"
    )


class Sampler:
    """An engine that is opened at the first request: a stage with nothing left to do loads nothing."""

    def __init__(self, opener: Callable[[], Engine], settings: dict[str, Any], n: int, seed: int):
        self._opener = opener
        self._engine: Engine | None = None
        self._seed = seed
        self.settings = settings
        self.n = n

    def __call__(
        self, requests: list[Request], shard: int, *, greedy: bool = False
    ) -> list[list[Completion]]:
        """Completions for one shard. Seeded by (seed, shard), so that a resumed run draws alike."""
        if self._engine is None:
            self._engine = self._opener()
        seed = int(np.random.default_rng([self._seed, shard, greedy]).integers(2**31))
        sampling = Sampling(
            n=1 if greedy else self.n,
            temperature=0.0 if greedy else self.settings["temperature"],
            top_p=1.0 if greedy else self.settings["top_p"],
            repetition_penalty=self.settings["repetition_penalty"],
            max_new_tokens=self.settings["max_new_tokens"],
            seed=seed,
        )
        answered = self._engine.generate(requests, sampling)
        if [len(row) for row in answered] != [sampling.n] * len(requests):
            raise StageError(f"the engine returned too few answers in shard {shard}; run it again")
        return answered


def select(split: Path, part: str, groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the split table in one part and some groups, ordered by image id."""
    rows = [
        row
        for row in shards.read(split, "split").to_pylist()
        if row["split"] == part and row["group"] in groups
    ]
    if not rows:
        raise StageError(f"{split} holds no {part} image of {' or '.join(groups)} classes")
    return sorted(rows, key=lambda row: row["image_id"])


def question(card: Card, style: str, prompt: str, names: list[str]) -> str:
    """The open question of a card, with the list of allowed names when `prompt = closed_list`."""
    if prompt not in ("open", "closed_list"):
        raise StageError(f"prompt must be open or closed_list; got {prompt!r}")
    listed = names if prompt == "closed_list" else None
    return prompts.open_question(card.noun, card.kind, style=style, names=listed)


def run_shards(
    output: Path,
    table: str,
    rows: list[dict[str, Any]],
    download: Path,
    text: Callable[[dict[str, Any]], str],
    sampler: Sampler,
    shard_size: int,
    desc: str,
    *,
    greedy: bool = False,
) -> None:
    """Ask about every row, one shard a time; shards already there are left alone.

    The images of the next shard are read while the engine works on this one.
    """
    parts = list(enumerate(shards.chunks(rows, shard_size)))
    todo = [(i, part) for i, part in parts if not shards.shard_path(output, table, i).exists()]
    done = len(rows) - sum(len(part) for _, part in todo)
    bar = progress(None, desc=desc, total=len(rows), unit="images", done=done)
    with bar, ThreadPoolExecutor(1) as reader:
        ahead = [reader.submit(read_images, download, part) for _, part in todo[:1]]
        for position, (index, part) in enumerate(todo):
            images = ahead.pop().result()
            ahead += [
                reader.submit(read_images, download, following)
                for _, following in todo[position + 1 : position + 2]
            ]
            requests = [
                Request(row["image_id"], images[row["image_id"]], text(row)) for row in part
            ]
            answered = sampler(requests, index, greedy=greedy)
            written = [
                as_rollout(request.key, number, completion)
                for request, completions in zip(requests, answered, strict=True)
                for number, completion in enumerate(completions)
            ]
            shards.write(shards.shard_path(output, table, index), written, schemas.rollouts())
            bar.update(len(part))


def read_images(download: Path, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Encoded bytes by image id.

    Raises StageError when an image of the split is not in Download.
    """
    wanted = {row["image_id"] for row in rows}
    found = {}
    here = pc.field("image_id").isin(sorted(wanted))
    for path in shards.paths(download, "images"):
        table = shards.read_file(path, ["image_id", "image"], here)
        for row in table.to_pylist():
            found[row["image_id"]] = row["image"]["bytes"]
    if lost := sorted(wanted - set(found)):
        raise StageError(f"{len(lost)} images are not in {download}, the first: {lost[0]}")
    return found


def describe(folder: Path, table: str, labels: dict[str, int], card: Card) -> dict[str, Any]:
    """Counts of a rollouts table: tokens, finish reasons, unparsed answers, Pass@1 and Pass@N."""
    names = ClassNames(card.classes, card.aliases)
    reasons: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    sampled: Counter[str] = Counter()
    tokens = unparsed = 0
    example = ""
    for row in _each(folder, table):
        reasons[row["finish_reason"]] += 1
        tokens += row["num_tokens"]
        sampled[row["image_id"]] += 1
        answer = answers.parse(row["completion"]).answer
        if answer is None:
            unparsed += 1
            example = example or row["completion"][:200]
        elif names.match(answer).class_id == labels[row["image_id"]]:
            correct[row["image_id"]] += 1
    n = max(sampled.values())
    hits = np.array([correct[key] for key in sampled])
    return {
        "images": len(sampled),
        "rollouts": sum(sampled.values()),
        "tokens": tokens,
        "finish_reasons": dict(reasons),
        "unparsed": unparsed,
        "example_unparsed": example,
        "pass_at_1": float(np.mean(pass_at_k(n, hits, 1))),
        "pass_at_n": float(np.mean(pass_at_k(n, hits, n))),
    }


def _each(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    return shards.iter_rows(
        folder, table, ["image_id", "completion", "finish_reason", "num_tokens"], 4096
    )


if __name__ == "__main__":
    main(propose)
