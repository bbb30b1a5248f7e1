"""Compares a policy before and after training: confusions, letters, calibration, refreshes.

The functions take rows of predictions, or the folders of the rounds, and `metrics.json` holds their
results. The statistics are in `tasks/evaluation/diagnostics.py`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.evaluation import diagnostics
from tasks.evaluation.diagnostics import Confusion
from tasks.evaluation.metrics import wilson
from tasks.questions import refresh
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.schemas import GROUPS

LETTER_MODES = ("mcq", "two_step")  # letter bias is measured in the first one that was evaluated
BINS = 5
PAIRS = 10  # listed confusions, resolved and introduced each
Row = Mapping[str, Any]


def confusions(
    before: Sequence[Row], after: Sequence[Row], mode: str, classes: Sequence[str]
) -> dict[str, Any]:
    """The confusions (truth, answer) that lost the most images, and those that gained the most.

    Both evaluations must hold the same images in that mode.
    """
    then, now = ({r["image_id"]: r for r in rows if r["mode"] == mode} for rows in (before, after))
    resolved, introduced = diagnostics.confusion_changes(
        [row["label"] for row in then.values()],
        [row["class_id"] for row in then.values()],
        [now[image_id]["class_id"] for image_id in then],
    )

    def rows_of(pairs: Sequence[Confusion]) -> list[dict[str, Any]]:
        return [
            {"truth": classes[pair.truth], "answer": classes[pair.answered]}
            | {"before": pair.before, "after": pair.after}
            for pair in pairs[:PAIRS]
        ]

    return {
        "mode": mode,
        "resolved": rows_of(resolved),
        "introduced": rows_of(introduced),
        "gone": sum(pair.before - pair.after for pair in resolved),
        "new": sum(pair.after - pair.before for pair in introduced),
    }


def by_class(
    evaluations: Sequence[Sequence[Row]], mode: str, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Accuracy of each class: correct images in each evaluation, and images; novel classes last.

    All evaluations must hold the same images in that mode.
    """
    accuracies: list[dict[str, Any]] = []
    for group in GROUPS:
        parts = [
            [r for r in rows if (r["mode"], r["group"]) == (mode, group)] for rows in evaluations
        ]
        if not all(parts):
            continue
        counts = [
            diagnostics.per_class([r["label"] for r in part], [r["correct"] for r in part])
            for part in parts
        ]
        accuracies += [
            {"class": classes[label], "group": group}
            | {"right": [count[label][0] for count in counts], "images": images}
            for label, (_, images) in counts[0].items()
        ]
    return accuracies


def letters(rows: Sequence[Row]) -> dict[str, Any]:
    """Letter bias in the first of `LETTER_MODES` that was evaluated; empty without any letter.

    It counts questions of two options or more. `no_letter` is the share of questions that were
    answered without a letter. For each letter, `chosen` and `expected` are shares of the answers with
    a letter, `bias` is `chosen - expected` with a 95 % interval, and `right` is the share of questions
    whose correct option it is. `p` tests all letters together
    (`tasks.evaluation.diagnostics.letter_bias`).
    """
    mode = next((m for m in LETTER_MODES if any(row["mode"] == m for row in rows)), "")
    asked = [row for row in rows if row["mode"] == mode and len(row["options"]) >= 2]
    measured = diagnostics.letter_bias(
        [row["letter"] for row in asked],
        [row["truth_letter"] for row in asked],
        [len(row["options"]) for row in asked],
    )
    read = len(asked) - measured.unread
    if not read:
        return {}
    by_letter: dict[str, dict[str, Any]] = {}
    for letter, counts in measured.letters.items():
        expected = counts.expected / read
        by_letter[letter] = {
            "chosen": counts.chosen / read,
            "expected": expected,
            "right": counts.right / len(asked),
            "bias": counts.chosen / read - expected,
            "interval": [end - expected for end in wilson(counts.chosen, read)],
        }
    return {
        "mode": mode,
        "questions": len(asked),
        "no_letter": measured.unread / len(asked),
        "statistic": measured.statistic,
        "freedom": measured.freedom,
        "p": measured.p,
        "letters": by_letter,
    }


def calibration(rows: Sequence[Row]) -> dict[str, Any]:
    """Calibration of the majority vote: its accuracy by the share of votes for the answer.

    It counts the images with an answer, and leaves out bins without images. `error` is the expected
    calibration error (`tasks.evaluation.diagnostics.calibration`).
    """
    voted = [row for row in rows if row["mode"] == "majority" and row["class_id"] >= 0]
    if not voted:
        return {}
    bins, error = diagnostics.calibration(
        [row["vote_share"] for row in voted], [row["correct"] for row in voted], BINS
    )
    return {
        "bins": [
            {"images": inside.images, "vote_share": inside.mean_share}
            | {"accuracy": inside.accuracy, "interval": list(wilson(inside.right, inside.images))}
            for inside in bins
            if inside.images
        ],
        "error": error,
        "images": len(voted),
    }


def refreshes(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of each round's proposals and questions, and their changes from the round before.

    Each of `rounds` holds the folders `build_mcq` and `train`. The results are, over all images:
    `truth_share`: the mean share of rollouts that name the truth.
    `entropy`: of the votes, in nats.
    `truth_votes`: how many images have 0, 1, 2, ... rollouts that name the truth.
    `kept_questions`: questions whose image had a question in the round before.
    `changed_options`: the kept questions with other options.
    `solved`: the questions whose last group of completions in training was all correct.
    """
    figures: list[dict[str, Any]] = []
    before: dict[str, frozenset[int]] = {}
    for entry in rounds:
        folder = Path(entry.get("build_mcq") or "")
        if not entry.get("build_mcq") or not list(folder.glob("candidates*.parquet")):
            figures.append({"round": entry.get("round")})
            continue
        columns = ["image_id", "votes", "truth_votes", "num_rollouts"]
        images = shards.read(folder, "candidates", columns).to_pylist()
        sets = {
            row["image_id"]: frozenset(row["option_class_ids"])
            for row in shards.read(folder, "mcq", ["image_id", "option_class_ids"]).to_pylist()
        }
        both = before.keys() & sets.keys()
        most = max((row["num_rollouts"] for row in images), default=0)
        # An image that was asked fewer times counts as if its further answers were like these.
        counts = Counter(
            round((row["truth_votes"] or 0) * most / max(1, row["num_rollouts"])) for row in images
        )
        shares = [
            (row["truth_votes"] or 0) / row["num_rollouts"] for row in images if row["num_rollouts"]
        ]
        figures.append(
            {
                "round": entry.get("round"),
                "truth_share": float(np.mean(shares)) if shares else None,
                "entropy": float(np.mean([_entropy(row["votes"]) for row in images]))
                if images
                else None,
                "truth_votes": [counts[n] for n in range(most + 1)],
                "questions": len(sets),
                "kept_questions": len(both) if before else None,
                "changed_options": sum(before[i] != sets[i] for i in both) if before else None,
                "new_questions": len(sets.keys() - before.keys()) if before else None,
                **solved(Path(entry["train"]) if entry.get("train") else None),
            }
        )
        before = sets
    return figures


def solved(train: Path | None) -> dict[str, Any]:
    """How many questions training asked, and for how many the last group was all correct."""
    if train is None or not list(train.glob("completions*.parquet")):
        return {}
    try:
        rewards = refresh.latest_rewards(train)
    except StageError:  # the method has no reward for a correct answer
        return {}
    return {"asked": len(rewards), "solved": sum(reward >= 1 for reward in rewards.values())}


def _entropy(votes: Sequence[int] | None) -> float:
    """The entropy of the candidates' votes, in nats."""
    counts = np.array([v for v in votes or () if v > 0], dtype=float)
    if len(counts) == 0:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0
