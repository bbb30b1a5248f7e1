"""Counts answers that are roughly right: wrong, but in a group of the truth, such as its genus.

The groups are those of the card's taxonomy. The depth of an answer is the share of the way to the
truth that it gets right (`tasks.language.taxonomy`), and 0 where the answer names nothing.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_cards import Card
from tasks.evaluation.metrics import wilson
from tasks.language.taxonomy import Taxonomy


def near_misses(rows: Sequence[Mapping[str, Any]], card: Card) -> dict[str, dict[str, Any]]:
    """Mode -> the near misses of its predictions; empty where the card has no taxonomy.

    `wrong` answers are counted, and `near`, those of them that share a group with the truth;
    `group_only` of these name no class. `share` is near / wrong and `depth` the mean depth over all
    images, both with 95 % intervals for the draw of images.
    """
    taxonomy = Taxonomy.of(card)
    if not taxonomy:
        return {}
    by_mode: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_mode.setdefault(row["mode"], []).append(row)
    return {mode: _counts(of_mode, taxonomy) for mode, of_mode in by_mode.items()}


def mean_near_misses(by_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mode -> mean `share` and `depth` over seeds, of the modes that all seeds have."""
    modes = [mode for mode in by_seed[0] if all(mode in seed for seed in by_seed)]
    means: dict[str, Any] = {}
    for mode in modes:
        shares = [seed[mode]["share"] for seed in by_seed if seed[mode]["share"] is not None]
        means[mode] = {
            "share": float(np.mean(shares)) if shares else None,
            "depth": float(np.mean([seed[mode]["depth"] for seed in by_seed])),
        }
    return means


def _counts(rows: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> dict[str, Any]:
    depths, near, group_only = [], 0, 0
    for row in rows:
        class_id = row["class_id"] if row["class_id"] >= 0 else None
        depths.append(taxonomy.depth(row["label"], class_id, row["answer"]))
        if class_id != row["label"] and depths[-1] > 0:
            near += 1
            group_only += class_id is None
    wrong = sum(row["class_id"] != row["label"] for row in rows)
    mean = float(np.mean(depths))
    reach = 1.96 * float(np.std(depths)) / math.sqrt(len(depths))
    return {
        "images": len(rows),
        "wrong": wrong,
        "near": near,
        "group_only": group_only,
        "share": near / wrong if wrong else None,
        "share_interval": list(wilson(near, wrong)) if wrong else None,
        "depth": mean,
        "depth_interval": [max(0.0, mean - reach), min(1.0, mean + reach)],
    }
