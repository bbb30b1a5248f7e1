"""BuildMCQ: rollouts -> merged candidates -> multiple-choice questions in frozen shards.

    python -m tasks.build_mcq CONFIG.json

Cheap and pure: the same rollouts and settings give the same bytes. `tasks.candidates` merges votes,
`tasks.options` chooses who stands beside the truth; two-step inference uses the same functions.
Rollouts from elsewhere come in, and questions go out to other trainers, by `tasks.exchange`.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_cards import Card, load
from tasks import labels, prompts, schemas, shards
from tasks.candidates import BLOCK_IMAGES, Merged, Vocabulary, merge_images
from tasks.mcq_tables import candidate_table, difficulties
from tasks.options import (
    Neighbours,
    Option,
    Rules,
    balanced_letters,
    choose_options,
    confusions,
    mcq_id,
    row_generator,
    shuffle_options,
)
from tasks.prompts import LETTERS
from tasks.propose import read_images, select
from tasks.run import StageError, main, progress

CONFUSED_PAIRS = 20  # told in stats.json
Row = dict[str, Any]


def build_mcq(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    propose: Path,
    prompt_style: str,
    num_options: int,
    min_options: int,
    top_up: str,
    vocabulary: str,
    fuzzy_threshold: float,
    fuzzy_margin: float,
    options_from: str,
    answer_from: str,
    min_truth_votes: int,
    max_unparsed_per_image: float,
    max_lost_share: float,
    shard_size: int,
    seed: int,
) -> None:
    """Write `candidates-*.parquet`, `mcq-*.parquet` and `stats.json`.

    Every train image has one row among the candidates, skipped ones included, with the reason in
    `outcome`: kept, no_candidates (nothing readable was proposed), too_many_unparsed (a larger
    share than `max_unparsed_per_image`), no_label, truth_only (the truth is the only candidate),
    truth_rarely_proposed (by fewer than `min_truth_votes`), too_few_options, or duplicate_image
    (the same bytes already gave a question). Raises StageError when the share of no_candidates
    exceeds `max_lost_share`, or rollouts are missing.
    """
    rules = Rules(
        num_options,
        min_options,
        top_up,
        vocabulary,
        fuzzy_threshold,
        fuzzy_margin,
        options_from,
        answer_from,
        min_truth_votes,
        max_unparsed_per_image,
    )
    builder = Builder(load(card), rules, prompt_style, shard_size, seed)
    rows = select(split, "train", ("base",))
    bar = partial(progress, desc="build_mcq", total=-(-len(rows) // shard_size), unit="shards")
    built = builder.shards(rows, propose, partial(read_images, download))
    for index, (table, questions) in enumerate(bar(built)):
        shards.write(shards.shard_path(output, "mcq", index), questions, schemas.mcq())
        schema = schemas.candidates(builder.card.classes)
        shards.write(shards.shard_path(output, "candidates", index), table, schema)
    stats = builder.stats
    outcomes = stats["outcomes"]
    if outcomes.get("no_candidates", 0) > max_lost_share * len(rows):
        raise StageError(
            f"{outcomes['no_candidates']} of {len(rows)} images have no readable candidate (more "
            f"than [BuildMCQ] max_lost_share = {max_lost_share:g}); look at the rollouts in {propose}"
        )
    if not outcomes.get("kept"):
        raise StageError(f"no image gave a question ({outcomes}); see {output}/candidates-*")
    (output / "stats.json").write_text(json.dumps(stats, indent=1), encoding="utf-8")
    print(
        f"build_mcq: {outcomes['kept']} questions from {len(rows)} images, truth injected into "
        f"{stats['injected']}; " + ", ".join(f"{n} {o}" for o, n in sorted(outcomes.items()))
    )


@dataclass
class Builder:
    """Builds the shards of one card under one set of rules, and counts what happened."""

    card: Card
    rules: Rules
    prompt_style: str
    shard_size: int
    seed: int
    stats: dict[str, Any] = field(default_factory=dict)

    def shards(
        self,
        rows: Sequence[Row],
        propose: Path,
        images_of: Callable[[list[Row]], dict[str, bytes]],
    ) -> Iterator[tuple[pa.Table, list[Row]]]:
        """(candidates, questions) of each `shard_size` of `rows`, which the split lists in order.

        `images_of` gives the encoded bytes by image id. `stats` is complete at the end.
        """
        self.rules.check()
        merged, base = self._merge(rows, propose)
        truths = [self._truth(row, block, i) for block in merged for row, i in _within(rows, block)]
        confused = confusions(merged, truths)
        near = Neighbours(self.card.classes, base, confused)
        self.stats = _empty_stats(len(rows))
        outcomes: Counter[str] = Counter()
        seen: set[str] = set()
        blocks = iter(merged)
        block = next(blocks)
        for index, part in enumerate(shards.chunks(list(rows), self.shard_size)):
            start = index * self.shard_size
            if start >= block.stop:
                block = next(blocks)
            images = images_of(part)
            told, questions = [], []
            for place, row in enumerate(part, start):
                truth = truths[place]
                options, outcome = self._options(row, block, place - block.start, truth, near)
                if outcome == "kept":
                    digest = hashlib.sha256(images[row["image_id"]]).hexdigest()
                    outcome = "duplicate_image" if digest in seen else outcome
                    seen.add(digest)
                if outcome == "kept":
                    questions.append((row, options, truth, place - block.start))
                told.append(outcome)
            outcomes.update(told)
            table = candidate_table(part, block, start - block.start, told, self.card)
            written = self._questions(questions, block, images, index)
            _count(self.stats, written, table, self.rules.num_options)
            yield table, written
        self.stats["outcomes"] = dict(outcomes)
        self.stats["most_confused"] = _most_confused(confused, self.card)

    def _merge(self, rows: Sequence[Row], propose: Path) -> tuple[list[Merged], list[int]]:
        rules, card = self.rules, self.card
        names = labels.ClassNames(
            card.classes,
            card.aliases,
            fuzzy_threshold=rules.fuzzy_threshold,
            fuzzy_margin=rules.fuzzy_margin,
        )
        labelled = {row["label"] for row in rows if _labelled(row)}
        base = sorted(labelled) or list(range(len(card.classes)))
        vocabulary = Vocabulary(names, frozenset(base), rules.vocabulary == "open")
        ids = [row["image_id"] for row in rows]
        # Whole shards, so that each lies in one block.
        size = self.shard_size * max(1, BLOCK_IMAGES // self.shard_size)
        merged = list(merge_images(propose, ids, vocabulary, size))
        without = [b.start + int(i) for b in merged for i in np.flatnonzero(b.counts[:, 0] == 0)]
        if without:
            raise StageError(
                f"{propose} has no rollouts of {len(without)} images, the first: {ids[without[0]]}"
            )
        return merged, base

    def _truth(self, row: Row, block: Merged, image: int) -> int:
        """The class id that counts as right, or -1 where there is none."""
        if self.rules.answer_from == "label":
            return row["label"] if _labelled(row) else -1
        low, high = block.starts[image], block.starts[image + 1]
        classes = block.class_ids[low:high]
        known = classes[classes >= 0]
        return int(known[0]) if len(known) else -1

    def _options(
        self, row: Row, block: Merged, image: int, truth: int, near: Neighbours
    ) -> tuple[list[Option], str]:
        rules = self.rules
        candidates = block.candidates_of(image)
        rollouts, unparsed = block.counts[image, 0], block.counts[image, 1]
        if candidates and unparsed > rules.max_unparsed_per_image * rollouts:
            return [], "too_many_unparsed"
        if candidates and truth < 0:
            return [], "no_label" if rules.answer_from == "label" else "no_candidates"
        by_text = "text" in (rules.top_up, rules.options_from) and bool(candidates)
        return choose_options(
            candidates,
            truth,
            num_options=rules.num_options,
            min_options=rules.min_options,
            top_up=rules.top_up,
            confusion=near.of("confusion", truth) if candidates else (),
            generator=row_generator(self.seed, row["image_id"]) if rules.draws else None,
            text=near.of("text", truth) if by_text else (),
            options_from=rules.options_from,
            min_truth_votes=rules.min_truth_votes,
        )

    def _questions(
        self,
        questions: list[tuple[Row, list[Option], int, int]],
        block: Merged,
        images: dict[str, bytes],
        index: int,
    ) -> list[Row]:
        counts = [len(options) for _, options, *_ in questions]
        positions = balanced_letters(counts, np.random.default_rng([self.seed, index]))
        hard = difficulties(block, [(image, truth) for *_, truth, image in questions])
        written = []
        for (row, options, truth, _), position, figures in zip(
            questions, positions, hard, strict=True
        ):
            image_id = row["image_id"]
            generator = row_generator(self.seed + 1, image_id)
            order = shuffle_options(options, generator, position, truth)
            names = [option.name or self.card.classes[option.class_id] for option in order]
            sources = [option.source for option in order]
            open_names = [option.name for option in order if option.name]
            ids = [option.class_id for option in order]
            written.append(
                {
                    "mcq_id": mcq_id(image_id, ids, open_names),
                    "image_id": image_id,
                    "image": {"bytes": images[image_id], "path": image_id},
                    "question": prompts.mcq_question(
                        self.card.noun, self.card.kind, names, style=self.prompt_style
                    ),
                    "options": names,
                    "option_class_ids": ids,
                    "option_votes": [option.votes for option in order],
                    "option_sources": sources,
                    "answer_letter": LETTERS[position],
                    "truth_injected": "truth" in sources,
                    "label_differs": _labelled(row) and row["label"] != truth,
                    **figures,
                }
            )
        return written


def _within(rows: Sequence[Row], block: Merged) -> Iterator[tuple[Row, int]]:
    return zip(rows[block.start : block.stop], range(block.stop - block.start), strict=True)


def _labelled(row: Row) -> bool:
    return row["label"] is not None and row["label"] >= 0


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
        "option_sources": {},
        "mean_options": 0.0,
        "answer_differs_from_label": 0,
        "match_steps": {},
        "labels_version": labels.VERSION,
    }


def _count(stats: dict[str, Any], written: list[Row], table: pa.Table, num_options: int) -> None:
    asked = sum(stats["letters"].values())
    for question in written:
        letter, size = question["answer_letter"], str(len(question["options"]))
        stats["injected"] += question["truth_injected"]
        stats["answer_differs_from_label"] += question["label_differs"]
        stats["letters"][letter] = stats["letters"].get(letter, 0) + 1
        stats["option_counts"][size] = stats["option_counts"].get(size, 0) + 1
        for source in question["option_sources"]:
            stats["option_sources"][source] = stats["option_sources"].get(source, 0) + 1
    options = stats["mean_options"] * asked + sum(len(q["options"]) for q in written)
    stats["mean_options"] = options / max(1, asked + len(written))
    for key, column in (
        ("rollouts", "num_rollouts"),
        ("unparsed", "num_unparsed"),
        ("outside_vocabulary", "num_outside"),
    ):
        stats[key] += int(np.sum(table[column].to_numpy()))
    ranks = table["truth_rank"].drop_null().to_numpy()
    stats["truth_in_top_k"] += int(np.sum(ranks <= num_options))
    steps = table["answer_steps"].combine_chunks().flatten()
    votes = table["answer_votes"].combine_chunks().flatten()
    told = pa.table({"step": steps, "votes": votes}).group_by("step").aggregate([("votes", "sum")])
    for row in told.to_pylist():
        stats["match_steps"][row["step"]] = (
            stats["match_steps"].get(row["step"], 0) + row["votes_sum"]
        )


def _most_confused(confused: dict[int, Counter[int]], card: Card) -> list[list[Any]]:
    """[truth, proposed instead, votes], most votes first."""
    pairs = [
        (votes, truth, other)
        for truth, counts in confused.items()
        for other, votes in counts.items()
        if other != truth
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [[card.classes[t], card.classes[o], int(v)] for v, t, o in pairs[:CONFUSED_PAIRS]]


if __name__ == "__main__":
    main(build_mcq)
