"""Turns frozen MCQ shards into the rows that a trainer reads.

Every use of a question draws a new order of its options, from (seed, epoch, mcq_id), so that a policy
cannot memorise letters. An image's place in an epoch depends on (seed, epoch, image_id) alone. So the
order goes on over all rounds, and a refreshed question does not move the others.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Image, concatenate_datasets
from numpy.typing import NDArray

from data_cards import Card
from tasks.language import prompts
from tasks.language.prompts import LETTERS
from tasks.tables import shards
from tasks.tables.pixels import Decoder, picture_size
from tasks.tables.schemas import JOINT
from tasks.tables.seeding import place_of, row_generator
from training.data.pairs import COLUMNS, Pairs, Use

# Dynamic sampling's questions use epochs from here on, which no run reaches by itself.
FURTHER = 1 << 20


class Place(NamedTuple):
    """A place in the order of questions: the epoch, and the image of the last question."""

    epoch: int
    image_id: str


Then = Callable[[dict[str, Any]], dict[str, Any]]


class Questions:
    """The frozen questions of one or several sets, asked in the words of each set's card.

    `style` is the prompt style of multiple-choice questions; None means open questions, which are
    shown as they were frozen. With `pairs_in` each question is followed by its partner (`training.data.pairs`)
    within steps of so many questions. `limit` keeps so many questions, of each set in proportion to its number
    of questions; 0 keeps all. Images are memory-mapped from a copy in the folder `cache`, and `decode`
    decodes them. `sizes` are the (width, height) of each question's image. Questions about images that the
    policy's processor refuses are left out; `refused` has the reasons by image id.
    """

    def __init__(
        self,
        mcq: Sequence[Path],
        cards: Sequence[Card],
        style: str | None,
        *,
        seed: int,
        pairs_in: int = 0,
        limit: int = 0,
        cache: Path | None = None,
        decode: Decoder = Decoder(),  # noqa: B008
    ):
        files = [path for folder in mcq for path in shards.paths(folder, "mcq")]
        whole = concatenate_datasets(
            [Dataset.from_parquet(str(f), cache_dir=str(cache) if cache else None) for f in files]
        )
        of_sets = [shards.count_rows(folder, "mcq") for folder in mcq]
        if limit and limit < sum(of_sets):
            whole = whole.select(sample(list(whole["image_id"]), of_sets, limit, seed))
        bytes_of = whole.select_columns("image").cast_column("image", Image(decode=False))
        sizes = [picture_size(row["image"]["bytes"]) for row in bytes_of]
        reasons = {n: why for n, size in enumerate(sizes) if (why := decode.refusal(*size))}
        self.refused = {whole["image_id"][number]: why for number, why in reasons.items()}
        if reasons:
            taken = [number for number in range(len(sizes)) if number not in reasons]
            whole, bytes_of = whole.select(taken), bytes_of.select(taken)
            sizes = [sizes[number] for number in taken]
        self.encoded, self.sizes = bytes_of, sizes
        self.frozen = whole.remove_columns("image")
        self.decode = decode
        self._pictures: dict[
            int, Any
        ] = {}  # decoded pictures of the last batch, by question number
        self.cards = {card.name: card for card in cards}
        self.style, self.seed = style, seed
        self.image_ids: list[str] = list(self.frozen["image_id"])
        self.pairs_in = pairs_in
        self.pairs = Pairs(self.frozen.select_columns(list(COLUMNS))[:], seed) if pairs_in else None

    def rows(
        self,
        num_uses: int,
        order: str = "shuffled",
        then: Then | None = None,
        *,
        after: Place | None = None,
        skipped: int = 0,
    ) -> Dataset:
        """A dataset of `num_uses` training rows, each made by `training_row` when it is read.

        `then`, if set, transforms each row. The order starts `after` the place where an earlier round
        ended. Before it come `skipped` rows, which the trainer skips. With `order` curriculum, each
        epoch's questions go from easy to hard: by falling margin of the truth's votes over those of
        the strongest other candidate.
        """
        easiness = np.array(self.frozen["margin"][:]) if order == "curriculum" else None

        def order_of(count: int) -> list[tuple[int, int]]:
            return question_order(self.image_ids, count, self.seed, easiness, after)

        if self.pairs:
            self.uses = self.pairs.filled(order_of, num_uses, self.pairs_in)
        else:
            self.uses = [Use(question, epoch, question) for question, epoch in order_of(num_uses)]
        uses = [Use(0, 0, 0)] * skipped + self.uses
        picked = self.frozen.select([use.question for use in uses]).flatten_indices()
        picked = picked.add_column("place", list(range(len(uses))))

        def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            own = [uses[place] for place in batch.pop("place")]
            pictures = self._read([use.image for use in own])
            rows = [
                self._row(dict(zip(batch, values, strict=True)), picture, use)
                for picture, use, *values in zip(pictures, own, *batch.values(), strict=True)
            ]
            rows = [then(row) for row in rows] if then else rows
            return {key: [row[key] for row in rows] for key in rows[0]}

        return picked.with_transform(render)

    def place(self, use: int) -> Place:
        """The place of the last dataset of `rows` after use number `use`, counted from 1."""
        last = self.uses[use - 1]
        return Place(last.epoch, self.image_ids[last.question])

    def further(self, count: int, occasion: int) -> list[dict[str, Any]]:
        """`count` rows for dynamic sampling, drawn from (seed, occasion) alone."""
        generator = np.random.default_rng([self.seed, FURTHER, occasion])
        drawn = generator.choice(len(self.frozen), count, replace=count > len(self.frozen))
        epoch = FURTHER + occasion
        numbers = [int(number) for number in drawn]
        return [
            self._row(self.frozen[number], picture, Use(number, epoch, number))
            for number, picture in zip(numbers, self._read(numbers), strict=True)
        ]

    def _read(self, numbers: Sequence[int]) -> list[Any]:
        """The decoded pictures of these questions; equal questions share one object.

        The trainer reads a row once a completion, and a batch once a turn of its loss, so the last
        batch's pictures are kept.
        """
        known = self._pictures
        self._pictures = {
            number: known.get(number) or self.decode(self.encoded[number]["image"]["bytes"])
            for number in {*numbers}
        }
        return [self._pictures[number] for number in numbers]

    def _row(self, row: dict[str, Any], picture: Any, use: Use) -> dict[str, Any]:
        card = self.cards[row["image_id"].split("/")[0]]
        row = self.pairs.posed(row, use) if self.pairs else row
        row = {**row, "image": picture, "epoch": use.epoch}
        return training_row(row, card, self.style, self.seed)


def sample(image_ids: Sequence[str], sizes: Sequence[int], limit: int, seed: int) -> list[int]:
    """The `limit` questions that are kept of several sets, as ascending indices.

    `image_ids` has one entry a question, set after set, and `sizes` has the sets' numbers of questions.
    Each set keeps its share of `limit`; the largest remainders get what rounding leaves. Within a set a
    question's chance depends on (seed, image_id) alone.
    """
    shares = [limit * size / sum(sizes) for size in sizes]
    kept = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (kept[i] - shares[i], i))
    for index in by_remainder[: limit - sum(kept)]:
        kept[index] += 1
    picked: list[int] = []
    start = 0
    for size, count in zip(sizes, kept, strict=True):
        own = range(start, start + size)
        picked += sorted(sorted(own, key=lambda i: place_of(f"{seed}/kept/{image_ids[i]}"))[:count])
        start += size
    return picked


def question_order(
    image_ids: Sequence[str],
    num_uses: int,
    seed: int,
    easiness: NDArray[np.floating] | None = None,
    after: Place | None = None,
) -> list[tuple[int, int]]:
    """(question, epoch) for each of `num_uses` uses; every epoch has all questions in a new order.

    `image_ids` has one entry a question. With `easiness`, one number a question, each epoch goes from
    easy to hard. The order begins `after` a place: with the later images of its epoch or, with
    `easiness`, with the next epoch.
    """
    order: list[tuple[int, int]] = []
    epoch = after.epoch if after else 0
    while len(order) < num_uses:
        keys = np.array(
            [place_of(f"{seed}/{epoch}/{image}") for image in image_ids], dtype=np.uint64
        )
        picked = np.argsort(keys, kind="stable")
        if after and epoch == after.epoch:
            reached = np.uint64(place_of(f"{seed}/{epoch}/{after.image_id}"))
            picked = picked[keys[picked] > reached] if easiness is None else picked[:0]
        picked = picked[: num_uses - len(order)]
        if easiness is not None:
            picked = picked[np.argsort(-easiness[picked], kind="stable")]
        order += [(int(q), epoch) for q in picked]
        epoch += 1
    return order


def training_row(row: dict[str, Any], card: Card, style: str | None, seed: int) -> dict[str, Any]:
    """A row of a shard as the trainer's columns, with its options permuted for its epoch.

    The columns: `prompt` (chat), `image` (PIL), `options` in the order shown, `answer_letter` of the
    truth, `label` (the truth's class id), `card`, `truth_share` (the share of rollouts that named the
    truth), `mcq_id`, `image_id` and, in training in pairs, `pair`. A question without an answer has no
    columns that tell one.
    """
    own = {"image": row["image"], "card": card.name}
    own |= {name: row[name] for name in ("mcq_id", "image_id", "pair") if name in row}
    if not row["answer_letter"]:
        return {"prompt": [{"role": "user", "content": row["question"]}], **own}
    truth = LETTERS.index(row["answer_letter"])
    asked = row["mcq_id"].partition(JOINT)[0]  # both questions of a pair have one order of options
    options, answer = permute(row["options"], truth, seed, row["epoch"], asked)
    text = row["question"]
    if style is not None:
        text = prompts.mcq_question(card.noun, card.kind, options, style=style)
    return {
        "prompt": [{"role": "user", "content": text}],
        "options": options,
        "answer_letter": LETTERS[answer],
        "label": row["option_class_ids"][truth],
        "truth_share": row["truth_share"],
        **own,
    }


def permute(
    options: list[str], answer: int, seed: int, epoch: int, mcq_id: str
) -> tuple[list[str], int]:
    """The options in the order of one epoch, and the answer's new index."""
    order = row_generator(seed, f"{epoch}/{mcq_id}").permutation(len(options))
    return [options[i] for i in order], int(np.flatnonzero(order == answer)[0])
