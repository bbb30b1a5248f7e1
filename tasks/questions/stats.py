"""Counts the questions and candidates of a BuildMCQ artifact, shard by shard, for `stats.json`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_cards import Card
from tasks.language import class_names

CONFUSED_PAIRS = 20


def empty_stats(images: int) -> dict[str, Any]:
    """All counts of `stats.json` at zero, for a set of `images` images."""
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
        "labels_version": class_names.VERSION,
    }


def count(stats: dict[str, Any], written: pa.Table, table: pa.Table, num_options: int) -> None:
    """Add one shard to `stats`: its questions `written` and its candidates `table`."""
    asked = sum(stats["letters"].values())
    sizes = pc.list_value_length(written["options"]).to_pylist()
    stats["mean_options"] = stats["mean_options"] * asked + sum(sizes)
    stats["mean_options"] /= max(1, asked + len(sizes))
    stats["injected"] += sum(written["truth_injected"].to_pylist())
    stats["answer_differs_from_label"] += sum(written["label_differs"].to_pylist())
    _add(stats["letters"], Counter(written["answer_letter"].to_pylist()))
    _add(stats["option_counts"], Counter(map(str, sizes)))
    _add(stats["option_sources"], Counter(pc.list_flatten(written["option_sources"]).to_pylist()))
    for key, column in (
        ("rollouts", "num_rollouts"),
        ("unparsed", "num_unparsed"),
        ("outside_vocabulary", "num_outside"),
    ):
        stats[key] += int(np.sum(table[column].to_numpy()))
    ranks = table["truth_rank"].drop_null().to_numpy()
    stats["truth_in_top_k"] += int(np.sum(ranks <= num_options))
    steps, votes = (pc.list_flatten(table[c]) for c in ("answer_steps", "answer_votes"))
    votes_by_step = (
        pa.table({"step": steps, "votes": votes})
        .group_by("step", use_threads=False)
        .aggregate([("votes", "sum")])
    )
    _add(stats["match_steps"], {row["step"]: row["votes_sum"] for row in votes_by_step.to_pylist()})


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for key, number in more.items():
        counts[key] = counts.get(key, 0) + number


def most_confused(confused: Mapping[int, Counter[int]], card: Card) -> list[list[Any]]:
    """The first CONFUSED_PAIRS [truth, proposed instead, votes], most votes first."""
    pairs = [
        (votes, truth, other)
        for truth, counts in confused.items()
        for other, votes in counts.items()
        if other != truth
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [[card.classes[t], card.classes[o], int(v)] for v, t, o in pairs[:CONFUSED_PAIRS]]
