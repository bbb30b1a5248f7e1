"""Is this reward curve normal? Plain words about a run, from its log alone."""

from collections.abc import Sequence
from typing import Any

WINDOW = 10  # steps a judgement rests on
FLAT = 0.02  # of the reward's range: less than this over many steps is no learning
DEAD = 0.8
COLLAPSED = 0.4  # of the length at the start
CLIPPED = 0.5


def warnings(log: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What is wrong with a run by now: the kind of trouble -> one sentence.

    `log` has one row a step with the columns of `train_log`; missing values are passed over.
    """
    if len(log) < WINDOW:
        return {}
    recent = log[-WINDOW:]
    found = {}
    formats = _values(recent, "reward/format") or _values(recent, "reward/caption_format")
    if formats and max(formats) == 0:
        found["format"] = (
            f"the format reward has been 0 for {WINDOW} steps: the policy does not write the tags it "
            "is asked for; look at completions-*.parquet, and at the prompt style"
        )
    start, now = _mean(log[:WINDOW], "completion_length"), _mean(recent, "completion_length")
    if start and now is not None and now < COLLAPSED * start:
        found["length"] = (
            f"completions have shrunk from {start:.0f} to {now:.0f} tokens: the policy has stopped "
            "to reason; a KL penalty (beta in trl) or a lower learning rate holds it"
        )
    clipped = _mean(recent, "clipped_share")
    if clipped is not None and clipped > CLIPPED:
        found["clipped"] = (
            f"{clipped:.0%} of the completions are cut at the longest length: raise "
            "max_completion_length, or pay for shorter ones (reward overlong)"
        )
    dead = _mean(recent, "dead_group_share")
    if dead is not None and dead > DEAD:
        found["dead"] = (
            f"{dead:.0%} of the groups carry no gradient, all their rewards being equal: the questions "
            "are too easy or too hard for this policy; dynamic_sampling replaces such groups"
        )
    if len(log) >= 3 * WINDOW and "dead" not in found:
        then, now = _mean(log[:WINDOW], "reward"), _mean(recent, "reward")
        best = max(_values(log, "reward"), default=0.0)
        if then is not None and now is not None and abs(now - then) < FLAT * max(best, 1e-9):
            found["flat"] = (
                f"the reward is flat: {then:.2f} in the first {WINDOW} steps, {now:.2f} in the last; "
                "a higher learning rate, more generations a question, or other questions may help"
            )
    watched = [row["val_accuracy"] for row in log if row.get("val_accuracy") is not None]
    if len(watched) > 1 and watched[-1] < 0.8 * max(watched):
        found["val"] = (
            f"open answers on val images have fallen to {watched[-1]:.2f} from {max(watched):.2f} "
            "while training: the reward rises at the cost of recognition; the best checkpoint is kept"
        )
    return found


def _values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = _values(rows, key)
    return sum(values) / len(values) if values else None
