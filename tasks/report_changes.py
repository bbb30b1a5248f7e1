"""What changed, from artifacts alone: confusions, letters, sureness, and what each refresh bought.

Pure functions on rows of predictions and on a round's folders; `metrics.json` holds what they
return. Where an old artifact lacks a column, its figure is worked out from the others.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks import shards
from tasks.metrics import wilson
from tasks.prompts import LETTERS

LETTER_MODES = ("mcq", "two_step")  # the first that is there shows letter bias
LETTER_REWARDS = ("reward/letter", "letter_reward")  # the column, now and in older artifacts
BINS = 5
PAIRS = 10  # confusions that are listed, each way
_VOTES = re.compile(r"^(\d+) of (\d+) votes")
Row = Mapping[str, Any]


def confusions(
    before: Sequence[Row], after: Sequence[Row], mode: str, classes: Sequence[str]
) -> dict[str, Any]:
    """Wrong answers by (truth, answer): which pairs lost and which gained the most images."""
    then, now = (_wrong_pairs(rows, mode) for rows in (before, after))
    change = {pair: now[pair] - then[pair] for pair in {*then, *now}}
    ranked = sorted(change, key=lambda pair: (change[pair], pair))

    def told(pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        return [
            {"truth": classes[t], "answer": classes[a], "before": then[t, a], "after": now[t, a]}
            for t, a in pairs
        ]

    return {
        "mode": mode,
        "resolved": told([pair for pair in ranked if change[pair] < 0][:PAIRS]),
        "introduced": told([pair for pair in ranked[::-1] if change[pair] > 0][:PAIRS]),
        "gone": sum(-c for c in change.values() if c < 0),
        "new": sum(c for c in change.values() if c > 0),
    }


def _wrong_pairs(rows: Sequence[Row], mode: str) -> Counter[tuple[int, int]]:
    return Counter(
        (row["label"], row["class_id"])
        for row in rows
        if row["mode"] == mode and not row["correct"] and row["class_id"] >= 0
    )


def by_class(
    evaluations: Sequence[Sequence[Row]], mode: str, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Accuracy of each class by evaluation, as (right, images), novel classes last."""
    found: dict[tuple[str, int], list[Counter[bool]]] = {}
    for number, rows in enumerate(evaluations):
        for row in rows:
            if row["mode"] == mode:
                key = (row["group"], row["label"])
                counts = found.setdefault(key, [Counter() for _ in evaluations])
                counts[number][bool(row["correct"])] += 1
    return [
        {"class": classes[label], "group": group}
        | {"right": [c[True] for c in counts], "images": counts[0].total()}
        for (group, label), counts in sorted(found.items())
    ]


def letters(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, Any]:
    """Letter bias: how much oftener each letter is chosen than it is right.

    Over the questions that hold the truth, in the first of `LETTER_MODES` that was asked. `bias`
    is the share chosen less the share right, with a 95 % interval over questions.
    """
    mode = next((m for m in LETTER_MODES if any(row["mode"] == m for row in rows)), "")
    pairs = []
    for row in rows:
        if row["mode"] == mode and row["options"]:
            chosen, truth = _letters(row, classes)
            if truth:
                pairs.append((chosen, truth))
    if not pairs:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for letter in sorted({truth for _, truth in pairs} | {c for c, _ in pairs if c}):
        gaps = np.array([float(c == letter) - float(t == letter) for c, t in pairs])
        half = 1.96 * gaps.std() / np.sqrt(len(gaps))
        found[letter] = {
            "chosen": sum(c == letter for c, _ in pairs) / len(pairs),
            "right": sum(t == letter for _, t in pairs) / len(pairs),
            "bias": float(gaps.mean()),
            "interval": [float(gaps.mean() - half), float(gaps.mean() + half)],
        }
    none = sum(not c for c, _ in pairs) / len(pairs)
    return {"mode": mode, "questions": len(pairs), "no_letter": none, "letters": found}


def _letters(row: Row, classes: Sequence[str]) -> tuple[str, str]:
    """The letters of what was chosen and of the truth; "" for none of the options."""
    if row.get("letter") is not None and row.get("truth_letter") is not None:
        return row["letter"], row["truth_letter"]

    def of(class_id: int) -> str:
        named = [classes[class_id]] if class_id >= 0 else []
        return next((LETTERS[row["options"].index(n)] for n in named if n in row["options"]), "")

    return of(row["class_id"]), of(row["label"])


def calibration(rows: Sequence[Row]) -> dict[str, Any]:
    """Do the votes know? Accuracy of the majority's answer by its share of the votes.

    `error` is the expected calibration error: the mean distance of share and accuracy over bins,
    weighted by images (Guo et al. 2017).
    """
    pairs = [(share, bool(row["correct"])) for row in rows if (share := _share(row)) is not None]
    if not pairs:
        return {}
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for share, correct in pairs:
        bins[min(BINS - 1, int(share * BINS))].append((share, correct))
    found = []
    for _, inside in sorted(bins.items()):
        right = sum(correct for _, correct in inside)
        found.append(
            {
                "images": len(inside),
                "vote_share": sum(share for share, _ in inside) / len(inside),
                "accuracy": right / len(inside),
                "interval": list(wilson(right, len(inside))),
            }
        )
    gaps = [
        len(inside) * abs(np.mean([share - correct for share, correct in inside]))
        for inside in bins.values()
    ]
    return {"bins": found, "error": float(sum(gaps)) / len(pairs), "images": len(pairs)}


def _share(row: Row) -> float | None:
    """The share of an image's rollouts that name what the majority answers."""
    if row["mode"] != "majority" or row["class_id"] < 0:
        return None
    if row.get("vote_share") is not None:
        return float(row["vote_share"])
    votes = _VOTES.match(row["status"])
    return int(votes[1]) / int(votes[2]) if votes else None


def refreshes(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each round's proposals and questions are like, and how they differ from the last's.

    `rounds` hold the folders `build_mcq` and `train`. Over all images: `truth_share`, the mean
    share of rollouts that name the truth, `entropy` of the votes in nats, and `truth_votes`, the
    images by how many rollouts name it. `kept_questions` are those whose image had a question
    before; `changed_options` of them with other wrong options; `solved` those of this round whose
    last answers in training were all right.
    """
    found: list[dict[str, Any]] = []
    before: dict[str, frozenset[int]] = {}
    for entry in rounds:
        folder = Path(entry.get("build_mcq") or "")
        if not entry.get("build_mcq") or not list(folder.glob("candidates*.parquet")):
            found.append({"round": entry.get("round")})
            continue
        columns = ["image_id", "votes", "truth_votes", "num_rollouts"]
        images = shards.read(folder, "candidates", columns).to_pylist()
        sets = {
            row["image_id"]: frozenset(row["option_class_ids"])
            for row in shards.read(folder, "mcq", ["image_id", "option_class_ids"]).to_pylist()
        }
        both = before.keys() & sets.keys()
        counts = Counter(row["truth_votes"] or 0 for row in images)
        most = max((row["num_rollouts"] for row in images), default=0)
        shares = [
            (row["truth_votes"] or 0) / row["num_rollouts"] for row in images if row["num_rollouts"]
        ]
        found.append(
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
    return found


def solved(train: Path | None) -> dict[str, Any]:
    """Of the questions asked in training, those whose last group of answers was all right."""
    if train is None or not list(train.glob("completions*.parquet")):
        return {}
    last: dict[str, tuple[int, list[float]]] = {}
    table = shards.read(train, "completions")
    reward = next((name for name in LETTER_REWARDS if name in table.column_names), None)
    if reward is None or "mcq_id" not in table.column_names:
        return {}  # a method that pays for something else
    for row in table.select(["step", "mcq_id", reward]).to_pylist():
        if row[reward] is None:
            continue
        step, rewards = last.get(row["mcq_id"], (-1, []))
        if row["step"] > step:
            last[row["mcq_id"]] = (row["step"], [row[reward]])
        elif row["step"] == step:
            rewards.append(row[reward])
    right = sum(min(rewards) >= 1 for _, rewards in last.values())
    return {"asked": len(last), "solved": right} if last else {}


def _entropy(votes: Sequence[int] | None) -> float:
    """Of the candidates' votes, in nats."""
    counts = np.array([v for v in votes or () if v > 0], dtype=float)
    if len(counts) == 0:
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0
