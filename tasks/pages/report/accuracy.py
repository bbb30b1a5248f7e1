"""The accuracy of evaluations by mode and group, with 95 % intervals and paired differences.

Rows are those of `tasks.tables.schemas.predictions`, with each image's group from the split.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.evaluation import metrics as statistics
from tasks.pages.text import in_order
from tasks.tables import shards
from tasks.tables.schemas import GROUPS

ROLLOUTS = "rollouts"  # the mode of sampled answers among a judge's rows
PASS_AT = (1, 5, 10, 20)
SEED = 0  # of the bootstrap: the same artifacts give the same report


def compare(rows: list[dict], before: list[dict] | None) -> dict[str, Any]:
    """Accuracy by mode and group, with intervals; with `before` also the paired differences."""
    result: dict[str, Any] = {"modes": {}}
    for mode in modes_of(rows):
        now = by_group(rows, mode)
        figures: dict[str, Any] = {group: accuracy(part) for group, part in now.items()}
        if len(now) == 2:
            figures["harmonic_mean"] = _harmonic_mean(now)
        if before is not None and (then := by_group(before, mode)):
            figures["difference"] = _differences(then, now)
        result["modes"][mode] = figures
    return result


def judged(judge: Path, split_rows: dict[str, dict]) -> dict[str, Any]:
    """Accuracy by mode and group with the verdicts of a Judge artifact, and harmonic means.

    An answer without a verdict counts as the card's names decide, and is counted (`undecided`). Among
    the answers with a verdict (`verdicts`), `agreement` is the share on which names and judge agree,
    None without a verdict; `names_alone` and `judge_alone` count those that one of the two calls right.
    `split_rows` are the rows of the split by image id.
    """
    result: dict[str, Any] = {}
    rows = [row for row in shards.read(judge, "judgements").to_pylist() if row["mode"] != ROLLOUTS]
    for row in rows:
        row["named"] = row["correct"]
        row["undecided"] = row["correct_judged"] is None
        row["correct"] = row["correct"] if row["undecided"] else row["correct_judged"]
        row["group"] = split_rows[row["image_id"]]["group"]
    for mode in modes_of(rows):
        groups = by_group(rows, mode)
        figures = {group: accuracy(part) | _agreement([part]) for group, part in groups.items()}
        if len(groups) == 2:
            figures["harmonic_mean"] = _harmonic_mean(groups) | _agreement(groups.values())
        result[mode] = figures
    return result


def judged_pass(judge: Path, split_rows: dict[str, dict]) -> dict[str, Any]:
    """Group -> Pass@k by names and by the verdicts of a Judge artifact; empty without judged samples.

    A sample without a verdict counts as the card's names decide. The values are by k, for k in PASS_AT.
    """
    hits: dict[str, dict[str, list[tuple[bool, bool]]]] = {}
    for row in shards.iter_rows(judge, "judgements"):
        if row["mode"] == ROLLOUTS:
            group = split_rows[row["image_id"]]["group"]
            verdict = row["correct"] if row["correct_judged"] is None else row["correct_judged"]
            of_image = hits.setdefault(group, {}).setdefault(row["image_id"], [])
            of_image.append((row["correct"], verdict))
    result: dict[str, Any] = {}
    for group, by_image in hits.items():
        counts = [(len(pairs), *map(sum, zip(*pairs, strict=True))) for pairs in by_image.values()]
        n, strict, verdicts = map(list, zip(*counts, strict=True))
        result[group] = {
            str(k): {
                "strict": float(statistics.pass_at_k(n, strict, k).mean()),
                "judged": float(statistics.pass_at_k(n, verdicts, k).mean()),
            }
            for k in PASS_AT
            if k <= min(n)
        }
    return result


def _agreement(parts: Iterable[dict[str, dict]]) -> dict[str, Any]:
    """How far names and judge agree on some images, as `judged` says."""
    rows = [row for part in parts for row in part.values()]
    decided = [(row["named"], row["judged"]) for row in rows if row["judged"] is not None]
    names_alone = sum(named and not judged for named, judged in decided)
    judge_alone = sum(judged and not named for named, judged in decided)
    agreed = len(decided) - names_alone - judge_alone
    return {
        "undecided": sum(row["undecided"] for row in rows),
        "verdicts": len(decided),
        "agreement": agreed / len(decided) if decided else None,
        "names_alone": names_alone,
        "judge_alone": judge_alone,
    }


def _harmonic_mean(groups: dict[str, dict[str, dict]]) -> dict[str, Any]:
    """The harmonic mean of base and novel accuracy, with its interval."""
    flags = [_flags(groups[group]) for group in GROUPS]
    rates = [sum(flag) / len(flag) for flag in flags]
    return {
        "accuracy": statistics.harmonic_mean(*rates),
        "interval": list(statistics.bootstrap_harmonic_mean(*flags, seed=SEED)),
    }


def accuracy(rows: dict[str, dict]) -> dict[str, Any]:
    """The accuracy over some images, by image id, with its interval and the counts of statuses."""
    correct = sum(row["correct"] for row in rows.values())
    return {
        "images": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "interval": list(statistics.wilson(correct, len(rows))),
        "status": dict(Counter(_kind(row["status"]) for row in rows.values()).most_common()),
    }


def modes_of(rows: list[dict]) -> list[str]:
    """The modes among the rows, in the order of the tables."""
    return in_order(row["mode"] for row in rows)


def by_group(rows: list[dict], mode: str) -> dict[str, dict[str, dict]]:
    """Group -> image id -> row, for one mode; groups without images are left out."""
    parts = {
        group: {r["image_id"]: r for r in rows if r["mode"] == mode and r["group"] == group}
        for group in GROUPS
    }
    return {group: part for group, part in parts.items() if part}


def _differences(then: dict[str, dict], now: dict[str, dict]) -> dict[str, Any]:
    """Paired differences by group: mean with interval, images won and lost, and McNemar's p."""
    result: dict[str, Any] = {}
    pairs: list[list[bool]] = []
    for group, rows in now.items():
        before, after = _flags(then[group], rows), _flags(rows)
        pairs += [before, after]
        mean, low, high = statistics.paired_difference(before, after, seed=SEED)
        result[group] = {
            "mean": mean,
            "interval": [low, high],
            "won": sum(a and not b for b, a in zip(before, after, strict=True)),
            "lost": sum(b and not a for b, a in zip(before, after, strict=True)),
            "p": statistics.mcnemar(before, after),
        }
    if len(now) == 2:
        mean, low, high = statistics.paired_harmonic_difference(*pairs, seed=SEED)
        result["harmonic_mean"] = {"mean": mean, "interval": [low, high]}
    return result


def _flags(rows: dict[str, dict], order: Iterable[str] | None = None) -> list[bool]:
    """Right or wrong by ascending id of the images `order`, so that two policies can be paired."""
    return [bool(rows[image_id]["correct"]) for image_id in sorted(order or rows)]


def _kind(status: str) -> str:
    """A status without its counts: "12 of 20 votes" is "votes"."""
    return re.sub(r"\d+ of \d+ ", "", status)
