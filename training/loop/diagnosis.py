"""Warns about a run that goes wrong, in plain sentences, from its log alone."""

import math
from collections.abc import Sequence
from typing import Any

WINDOW = 10  # steps that are averaged
FLAT = 0.02  # a reward that changes by less than this share of the best one is flat
DEAD = 0.8  # share of zero-variance groups above which to warn
COLLAPSED = 0.4  # completions shorter than this share of their first length have collapsed
FORMATS = ("format", "caption_format", "direct_format")  # the rewards of a completion's form
SHORTER = ("direct_format", "think_length")  # the rewards that ask for shorter completions
CLIPPED = 0.5  # share of clipped completions above which to warn


def warnings(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The problems that the log shows so far: kind of problem -> one sentence.

    `log` has one row a step with the columns of `train_log`. Missing values are ignored.
    """
    problems = {}
    for key in ("loss", "grad_norm"):
        if not all(map(math.isfinite, _values(log[-1:], key))):
            problems["not finite"] = (
                f"{key} is {log[-1][key]}, and such a step ruins the weights: train this round again with "
                "a lower learning rate"
            )
    if len(log) < WINDOW:
        return problems
    recent = log[-WINDOW:]
    formats = [_values(recent, f"reward/{name}") for name in FORMATS]
    if any(values and max(values) == 0 for values in formats):
        problems["format"] = (
            f"the format reward has been 0 for {WINDOW} steps: the policy does not write the tags it "
            "is asked for; look at completions-*.parquet, and at the prompt style"
        )
    start, now = _mean(log[:WINDOW], "completion_length"), _mean(recent, "completion_length")
    asked = any(_values(recent, f"reward/{name}") for name in SHORTER)
    if start and now is not None and now < COLLAPSED * start and not asked:
        problems["length"] = (
            f"completions have shrunk from {start:.0f} to {now:.0f} tokens: the policy has stopped "
            "to reason; a KL penalty (beta in trl) or a lower learning rate holds it"
        )
    clipped = _mean(recent, "clipped_share")
    if clipped is not None and clipped > CLIPPED:
        problems["clipped"] = (
            f"{clipped:.0%} of the completions are cut at the longest length: raise "
            "max_completion_length, or pay for shorter ones (reward overlong)"
        )
    dead = _mean(recent, "dead_group_share")
    if dead is not None and dead > DEAD:
        problems["dead"] = (
            f"{dead:.0%} of the groups carry no gradient, all their rewards being equal: the questions "
            "are too easy or too hard for this policy; dynamic_sampling replaces such groups"
        )
    if len(log) >= 3 * WINDOW and "dead" not in problems:
        then, now = _mean(log[:WINDOW], "reward"), _mean(recent, "reward")
        best = max(_values(log, "reward"), default=0.0)
        if then is not None and now is not None and abs(now - then) < FLAT * max(best, 1e-9):
            problems["flat"] = (
                f"the reward is flat: {then:.2f} in the first {WINDOW} steps, {now:.2f} in the last; "
                "a higher learning rate, more generations a question, or other questions may help"
            )
    accuracies = [row["val_accuracy"] for row in log if row.get("val_accuracy") is not None]
    if len(accuracies) > 1 and accuracies[-1] < 0.8 * max(accuracies):
        problems["val"] = (
            f"open answers on val images have fallen to {accuracies[-1]:.2f} from {max(accuracies):.2f} "
            "while training: the reward rises at the cost of recognition; the best checkpoint is kept"
        )
    return problems


def _values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return sum(values) / len(values) if values else None
