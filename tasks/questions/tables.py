"""The columns that BuildMCQ writes beside a question: candidates, distinct answers, difficulty."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_cards import Card
from tasks.questions.votes import Merged


def candidate_table(
    part: Sequence[dict[str, Any]], block: Merged, first: int, outcomes: Sequence[str], card: Card
) -> pa.Table:
    """The rows of `tasks.tables.schemas.candidates` for the images `part`.

    The first of them is image number `first` of the block.
    """
    images = slice(first, first + len(part))
    candidate_slice = slice(block.starts[first], block.starts[first + len(part)])
    answer_slice = slice(block.answer_starts[first], block.answer_starts[first + len(part)])
    starts = _offsets(block.starts, first, len(part))
    answer_starts = _offsets(block.answer_starts, first, len(part))
    labels = np.array([-1 if row["label"] is None else row["label"] for row in part], np.int64)
    class_ids, votes = block.class_ids[candidate_slice], block.votes[candidate_slice]
    names = np.array(card.classes, object)[class_ids]
    for index, name in block.names.items():
        if candidate_slice.start <= index < candidate_slice.stop:
            names[index - candidate_slice.start] = name
    owner = np.repeat(np.arange(len(part)), np.diff(starts))
    hits = np.flatnonzero(class_ids == labels[owner])
    rank = np.zeros(len(part), np.int32)
    rank[owner[hits]] = hits - starts[owner[hits]] + 1
    truth_votes = np.zeros(len(part), np.int32)
    truth_votes[owner[hits]] = votes[hits]
    codes = block.answer_codes[answer_slice]
    texts = pa.array(block.texts, pa.string()).take(codes) if len(codes) else pa.array([], "string")
    steps = pa.array(block.steps, pa.string()).take(codes) if len(codes) else pa.array([], "string")
    counts = block.counts[images].astype(np.int32)
    return pa.table(
        {
            "image_id": pa.array([row["image_id"] for row in part], pa.string()),
            "label": labels,
            "names": _lists(starts, pa.array(names, pa.string())),
            "class_ids": _lists(starts, pa.array(class_ids)),
            "votes": _lists(starts, pa.array(votes)),
            "truth_rank": pa.array(rank, mask=rank == 0),
            "truth_votes": truth_votes,
            "num_rollouts": counts[:, 0],
            "num_unparsed": counts[:, 1],
            "num_outside": counts[:, 2],
            "outcome": pa.array(outcomes, pa.string()),
            "answers": _lists(answer_starts, texts),
            "answer_votes": _lists(answer_starts, pa.array(block.answer_votes[answer_slice])),
            "answer_class_ids": _lists(answer_starts, pa.array(block.answer_class_ids[codes])),
            "answer_steps": _lists(answer_starts, steps),
        }
    )


def difficulties(
    block: Merged, images: Sequence[int], truths: Sequence[int]
) -> dict[str, list[float]]:
    """How hard each question is for this policy, as columns; `images` count from `block.start`.

    `truth_share` is the share of rollouts that named the truth. `margin` is that share less the
    share of the strongest other candidate, from -1 (hard) to 1 (easy). `entropy` is that of the
    votes over the candidates, in nats. Every image must have a candidate.
    """
    if not images:
        return {"truth_share": [], "margin": [], "entropy": []}
    asked = np.asarray(images)
    lengths = block.starts[asked + 1] - block.starts[asked]
    first = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(len(asked)), lengths)
    indices = block.starts[asked][owner] + np.arange(len(owner)) - first[owner]
    votes = block.votes[indices]
    right = block.class_ids[indices] == np.asarray(truths)[owner]
    mine = np.bincount(owner, votes * right)
    others = np.maximum.reduceat(np.where(right, 0, votes), first)
    shares = votes / np.bincount(owner, votes)[owner]
    rollouts = block.counts[asked, 0]
    return {
        "truth_share": (mine / rollouts).tolist(),
        "margin": ((mine - others) / rollouts).tolist(),
        "entropy": np.abs(np.bincount(owner, shares * np.log(shares))).tolist(),
    }


def _offsets(starts: np.ndarray, first: int, count: int) -> np.ndarray:
    return starts[first : first + count + 1] - starts[first]


def _lists(starts: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), values)
