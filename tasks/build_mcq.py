"""BuildMCQ: rollouts -> merged candidates -> multiple-choice questions in frozen shards.

    python -m tasks.build_mcq CONFIG.json

Cheap and pure: the same rollouts and settings give the same bytes. The rules, and where they
depart from the method's first implementation:

- votes merge by class before anything is cut, so spelling variants never split a class's votes;
- names that are no base class are dropped before the top k are cut, and a novel class is never
  offered in training;
- an absent truth takes the place of the candidate with the fewest votes, and the row says so;
- one wrong candidate alone is topped up by what this policy confuses the truth with most often;
- letters are balanced within one among the questions of a shard that have equally many options.

Two-step inference builds its question with the same functions (`merge`, `shuffle_options`).
"""

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card, load
from tasks import answers, prompts, schemas, shards
from tasks.labels import ClassNames
from tasks.prompts import LETTERS
from tasks.propose import read_images, select
from tasks.run import StageError, main, progress

TOP_UPS = ("confusion", "random", "none")


@dataclass(frozen=True)
class Candidate:
    """A distinct class among an image's rollouts; `logprob` is the mean over its votes, in nats."""

    class_id: int
    votes: int
    logprob: float


@dataclass(frozen=True)
class Option:
    """One option of a question, with where it came from: policy, truth or top_up."""

    class_id: int
    votes: int
    source: str


def build_mcq(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    propose: Path,
    prompt_style: str,
    num_options: int,
    top_up: str,
    min_options: int,
    max_lost_share: float,
    shard_size: int,
    seed: int,
) -> None:
    """Write `candidates-*.parquet`, `mcq-*.parquet` and `stats.json`.

    Every train image has one row among the candidates, skipped ones included, with the reason in
    `outcome`: kept, truth_only (the truth is the only candidate), too_few_options,
    duplicate_image (the same bytes already gave a question), or no_candidates (nothing
    readable was proposed). Raises StageError when the share of no_candidates exceeds
    `max_lost_share`, or rollouts are missing.
    """
    data_card = load(card)
    if not 2 <= num_options <= len(LETTERS) or not 2 <= min_options <= num_options:
        raise StageError(
            f"[BuildMCQ] needs 2 <= min_options <= num_options <= {len(LETTERS)}; got "
            f"min_options = {min_options}, num_options = {num_options}"
        )
    if top_up not in TOP_UPS:
        raise StageError(f"[BuildMCQ] top_up must be one of {', '.join(TOP_UPS)}; got {top_up!r}")
    rows = select(split, "train", ("base",))
    base = sorted({row["label"] for row in rows})
    merged = merge_all(propose, ClassNames(data_card.classes, data_card.aliases), set(base))
    if lost := [row["image_id"] for row in rows if row["image_id"] not in merged]:
        raise StageError(f"{propose} has no rollouts of {len(lost)} images, the first: {lost[0]}")
    confusion = confusions(rows, merged, base)
    seen: set[str] = set()
    outcomes: Counter[str] = Counter()
    parts = list(shards.chunks(rows, shard_size))
    stats = _empty_stats(len(rows))
    for index, part in enumerate(
        progress(parts, desc="build_mcq", total=len(parts), unit="shards")
    ):
        images = read_images(download, part)
        questions, table = [], []
        for row in part:
            votes = merged[row["image_id"]]
            digest = hashlib.sha256(images[row["image_id"]]).hexdigest()
            generator = row_generator(seed, row["image_id"])
            options, outcome = choose_options(
                votes.candidates,
                row["label"],
                num_options=num_options,
                min_options=min_options,
                top_up=top_up,
                confusion=confusion[row["label"]],
                generator=generator,
            )
            if outcome == "kept" and digest in seen:
                outcome = "duplicate_image"
            outcomes[outcome] += 1
            table.append(_candidate_row(row, votes, outcome, data_card))
            if outcome == "kept":
                seen.add(digest)
                questions.append((row, options))
        written = _shard(questions, images, data_card, prompt_style, seed, index)
        shards.write(shards.shard_path(output, "mcq", index), written, schemas.mcq())
        candidate_path = shards.shard_path(output, "candidates", index)
        shards.write(candidate_path, table, schemas.candidates(data_card.classes))
        _count(stats, written, table, num_options)
    stats["outcomes"] = dict(outcomes)
    if outcomes["no_candidates"] > max_lost_share * len(rows):
        raise StageError(
            f"{outcomes['no_candidates']} of {len(rows)} images have no readable candidate (more "
            f"than [BuildMCQ] max_lost_share = {max_lost_share:g}); look at the rollouts in {propose}"
        )
    if not outcomes["kept"]:
        raise StageError(f"no image gave a question ({dict(outcomes)}); see {output}/candidates-*")
    (output / "stats.json").write_text(json.dumps(stats, indent=1), encoding="utf-8")
    print(
        f"build_mcq: {outcomes['kept']} questions from {len(rows)} images, truth injected into "
        f"{stats['injected']}; " + ", ".join(f"{n} {o}" for o, n in sorted(outcomes.items()))
    )


@dataclass
class Votes:
    """One image's rollouts, merged: candidates by falling votes, and what could not be counted."""

    candidates: list[Candidate]
    num_rollouts: int
    num_unparsed: int
    num_outside: int


def merge_all(propose: Path, names: ClassNames, allowed: set[int]) -> dict[str, Votes]:
    """Votes by image id over all rollout shards; each (image_id, rollout) counts once."""
    merged: dict[str, Votes] = {}
    for image_id, rows in _by_image(propose):
        numbers = [row["rollout"] for row in rows]
        if image_id in merged or len(set(numbers)) != len(numbers):
            raise StageError(f"{propose} holds rollouts of {image_id} twice; delete and re-run it")
        pairs = [(row["completion"], row["mean_logprob"]) for row in rows]
        merged[image_id] = merge(pairs, names, allowed)
    return merged


def merge(completions: Iterable[tuple[str, float]], names: ClassNames, allowed: set[int]) -> Votes:
    """Merge sampled answers, given as (completion, mean log-probability), by class.

    Only classes in `allowed` become candidates. Order: votes, then mean log-probability of the
    class's answers, then class id, so the order of the input never matters.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    total = unparsed = outside = 0
    for text, logprob in completions:
        total += 1
        answer = answers.parse(text).answer
        class_id = names.match(answer).class_id if answer is not None else None
        if answer is None:
            unparsed += 1
        elif class_id is None or class_id not in allowed:
            outside += 1
        else:
            scores[class_id].append(logprob)
    found = [
        Candidate(class_id, len(values), float(np.mean(sorted(values))))
        for class_id, values in scores.items()
    ]
    found.sort(key=lambda c: (-c.votes, -c.logprob, c.class_id))
    return Votes(found, total, unparsed, outside)


def confusions(
    rows: Sequence[dict[str, Any]], merged: dict[str, Votes], base: Sequence[int]
) -> dict[int, list[int]]:
    """For each base class, the other base classes by how often this policy proposes them for it."""
    counts: dict[int, Counter[int]] = {label: Counter() for label in base}
    for row in rows:
        for candidate in merged[row["image_id"]].candidates:
            counts[row["label"]][candidate.class_id] += candidate.votes
    return {
        label: sorted((c for c in base if c != label), key=lambda c: (-counts[label][c], c))
        for label in base
    }


def choose_options(
    candidates: Sequence[Candidate],
    truth: int,
    *,
    num_options: int,
    min_options: int,
    top_up: str,
    confusion: Sequence[int],
    generator: np.random.Generator,
) -> tuple[list[Option], str]:
    """The options of one question by falling votes, truth among them, and the outcome.

    `confusion` lists the other base classes, most often confused with the truth first.
    """
    if not candidates:
        return [], "no_candidates"
    if [c.class_id for c in candidates] == [truth]:
        return [], "truth_only"
    options = [Option(c.class_id, c.votes, "policy") for c in candidates[:num_options]]
    if truth not in {option.class_id for option in options}:
        votes = next((c.votes for c in candidates if c.class_id == truth), 0)
        # When full, the candidate with the fewest votes, the last one, makes room.
        options = [*options[: num_options - 1], Option(truth, votes, "truth")]
    if top_up != "none" and len(options) < min_options:
        pool = list(confusion)
        if top_up == "random":
            pool = [pool[i] for i in generator.permutation(len(pool))]
        taken = {option.class_id for option in options}
        spare = [class_id for class_id in pool if class_id not in taken]
        options += [Option(c, 0, "top_up") for c in spare[: min_options - len(options)]]
    return (options, "kept") if len(options) >= 2 else (options, "too_few_options")


def shuffle_options(
    options: Sequence[Option],
    generator: np.random.Generator,
    truth_at: int | None = None,
    truth: int = -1,
) -> list[Option]:
    """Options in random order; with `truth_at` the truth stands at that position."""
    order = [options[i] for i in generator.permutation(len(options))]
    if truth_at is None:
        return order
    rest = [option for option in order if option.class_id != truth]
    right = next(option for option in order if option.class_id == truth)
    return [*rest[:truth_at], right, *rest[truth_at:]]


def balanced_letters(counts: Sequence[int], generator: np.random.Generator) -> list[int]:
    """A truth position for each question, given its option count.

    Among questions with n options each of the n positions is used equally often, within one.
    """
    positions = [0] * len(counts)
    for n in sorted(set(counts)):
        where = [i for i, count in enumerate(counts) if count == n]
        deck = np.concatenate([generator.permutation(n) for _ in range(len(where) // n + 1)])
        # Which letters get the odd ones out is random, so the first letters are not favoured.
        for place, position in zip(generator.permutation(where), deck, strict=False):
            positions[int(place)] = int(position)
    return positions


def row_generator(seed: int, key: str) -> np.random.Generator:
    """A generator that depends on (seed, key) alone, never on the order of rows."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def mcq_id(image_id: str, class_ids: Iterable[int]) -> str:
    """A name for a question that depends on the image and the set of its options, not their order."""
    text = image_id + "|" + ",".join(str(c) for c in sorted(class_ids))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _shard(
    questions: list[tuple[dict[str, Any], list[Option]]],
    images: dict[str, bytes],
    card: Card,
    style: str,
    seed: int,
    index: int,
) -> list[dict[str, Any]]:
    counts = [len(options) for _, options in questions]
    positions = balanced_letters(counts, np.random.default_rng([seed, index]))
    written = []
    for (row, options), position in zip(questions, positions, strict=True):
        generator = row_generator(seed + 1, row["image_id"])
        order = shuffle_options(options, generator, position, row["label"])
        names = [card.classes[option.class_id] for option in order]
        image_id = row["image_id"]
        written.append(
            {
                "mcq_id": mcq_id(image_id, (option.class_id for option in order)),
                "image_id": image_id,
                "image": {"bytes": images[image_id], "path": image_id},
                "question": prompts.mcq_question(card.noun, card.kind, names, style=style),
                "options": names,
                "option_class_ids": [option.class_id for option in order],
                "option_votes": [option.votes for option in order],
                "option_sources": [option.source for option in order],
                "answer_letter": LETTERS[position],
                "truth_injected": any(option.source == "truth" for option in order),
            }
        )
    return written


def _candidate_row(row: dict[str, Any], votes: Votes, outcome: str, card: Card) -> dict[str, Any]:
    ids = [candidate.class_id for candidate in votes.candidates]
    rank = ids.index(row["label"]) + 1 if row["label"] in ids else None
    return {
        "image_id": row["image_id"],
        "label": row["label"],
        "names": [card.classes[class_id] for class_id in ids],
        "class_ids": ids,
        "votes": [candidate.votes for candidate in votes.candidates],
        "truth_rank": rank,
        "truth_votes": votes.candidates[rank - 1].votes if rank else 0,
        "num_rollouts": votes.num_rollouts,
        "num_unparsed": votes.num_unparsed,
        "num_outside": votes.num_outside,
        "outcome": outcome,
    }


def _empty_stats(images: int) -> dict[str, Any]:
    return {
        "images": images,
        "injected": 0,
        "letters": {},
        "option_counts": {},
        "rollouts": 0,
        "unparsed": 0,
        "outside_vocabulary": 0,
        "truth_in_top_k": 0,
    }


def _count(stats: dict[str, Any], written: list[dict], table: list[dict], num_options: int) -> None:
    for question in written:
        letter, size = question["answer_letter"], str(len(question["options"]))
        stats["injected"] += question["truth_injected"]
        stats["letters"][letter] = stats["letters"].get(letter, 0) + 1
        stats["option_counts"][size] = stats["option_counts"].get(size, 0) + 1
    for row in table:
        stats["rollouts"] += row["num_rollouts"]
        stats["unparsed"] += row["num_unparsed"]
        stats["outside_vocabulary"] += row["num_outside"]
        stats["truth_in_top_k"] += (
            row["truth_rank"] is not None and row["truth_rank"] <= num_options
        )


def _by_image(propose: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    columns = ["image_id", "rollout", "completion", "mean_logprob"]
    every = shards.iter_rows(propose, "rollouts", columns, 4096)
    for image_id, rows in itertools.groupby(every, key=lambda row: row["image_id"]):
        yield image_id, list(rows)


if __name__ == "__main__":
    main(build_mcq)
