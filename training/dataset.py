"""Frozen MCQ shards -> the rows a GRPO trainer reads.

Every use of a question permutes its options anew, from (seed, epoch, mcq_id), so that letters can
never be memorised. Which questions come in which step depends on (seed, round) alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from data_cards import Card
from tasks import prompts, shards
from tasks.prompts import LETTERS
from tasks.run import StageError
from tasks.seeding import row_generator

ORDERS = ("shuffled", "curriculum")


def question_order(
    num_questions: int,
    num_uses: int,
    seed: int,
    round_: int,
    easiness: NDArray[np.floating] | None = None,
) -> list[tuple[int, int]]:
    """(question, epoch) for each of `num_uses` uses: every epoch is a fresh permutation.

    With `easiness`, one number a question, each epoch holds the same questions from easy to hard.
    """
    order: list[tuple[int, int]] = []
    epoch = 0
    while len(order) < num_uses:
        generator = np.random.default_rng([seed, round_, epoch])
        picked = generator.permutation(num_questions)[: num_uses - len(order)]
        if easiness is not None:
            picked = picked[np.argsort(-easiness[picked], kind="stable")]
        order += [(int(q), epoch) for q in picked]
        epoch += 1
    return order


def training_rows(
    mcq: Sequence[Path],
    cards: Sequence[Card],
    style: str,
    *,
    num_uses: int,
    seed: int,
    round_: int,
    order: str = "shuffled",
    cache: Path | None = None,
) -> Dataset:
    """A dataset of `num_uses` rows: prompt (chat), image, options, answer_letter, mcq_id.

    The questions of all folders in `mcq` are drawn from alike; each is asked in the words of the
    card it belongs to, which its image id begins with. `order` is shuffled, or curriculum: by
    falling margin of the truth over the strongest other candidate among the policy's proposals.
    Images stay on disk, memory-mapped from a copy in the folder `cache`; a row is permuted and
    rendered when it is read. Raises StageError for an unknown order.
    """
    files = [path for folder in mcq for path in shards.paths(folder, "mcq")]
    by_name = {card.name: card for card in cards}
    frozen = concatenate_datasets(
        [Dataset.from_parquet(str(path), cache_dir=str(cache) if cache else None) for path in files]
    )
    if order not in ORDERS:
        raise StageError(f"[Train] order must be one of {', '.join(ORDERS)}; got {order!r}")
    easiness = np.array(frozen["margin"][:]) if order == "curriculum" else None
    uses = question_order(len(frozen), num_uses, seed, round_, easiness)
    picked = frozen.select([question for question, _ in uses]).flatten_indices()
    picked = picked.add_column("epoch", [epoch for _, epoch in uses])

    def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        rendered = [
            training_row(row, by_name[row["image_id"].split("/")[0]], style, seed) for row in rows
        ]
        return {key: [row[key] for row in rendered] for key in rendered[0]}

    return picked.with_transform(render)


def training_row(row: dict[str, Any], card: Card, style: str, seed: int) -> dict[str, Any]:
    """One shard row with its options permuted for its epoch, as the trainer's columns."""
    options, answer = permute(
        row["options"], LETTERS.index(row["answer_letter"]), seed, row["epoch"], row["mcq_id"]
    )
    text = prompts.mcq_question(card.noun, card.kind, options, style=style)
    return {
        "prompt": [{"role": "user", "content": text}],
        "image": row["image"],
        "options": options,
        "answer_letter": LETTERS[answer],
        "mcq_id": row["mcq_id"],
    }


def permute(
    options: list[str], answer: int, seed: int, epoch: int, mcq_id: str
) -> tuple[list[str], int]:
    """Options in the order of one epoch, and where the answer went."""
    order = row_generator(seed, f"{epoch}/{mcq_id}").permutation(len(options))
    return [options[i] for i in order], int(np.flatnonzero(order == answer)[0])
