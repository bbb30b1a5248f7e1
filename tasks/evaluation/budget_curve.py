"""The curve of accuracy over answers an image, from the stored rollouts of one evaluation, without a model.

Its points are strategies: one step, the majority of the first N samples, two steps with k options, and
adaptive. Answers that were given are counted. A two-step answer with another k was never asked for:
such an image counts as wrong in the lower end of the point's accuracy and, where the truth would be
among the options, as right in the upper end. So `low` and `high` differ where something was not
asked, and nothing is guessed. `known` is the share of images whose answer is known.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card
from tasks.evaluation import adaptive
from tasks.evaluation.adaptive import Thresholds
from tasks.evaluation.metrics import bootstrap_harmonic_mean, harmonic_mean
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge_all
from tasks.questions.votes import Votes
from tasks.tables import shards
from tasks.tables.schemas import GROUPS

MAJORITIES = (4, 8, 12, 20)  # numbers of samples, as far as there are so many
OPTIONS = (2, 3, 4, 5)
INSTALMENTS = (4, 8)  # of the adaptive point where the mode was not evaluated
SEED = 0  # of the bootstrap
# Image id -> (surely right, possibly right, answers).
Outcomes = dict[str, tuple[bool, bool, int]]


def budget_curve(
    folder: Path, rows: Sequence[Mapping[str, Any]], card: Card
) -> list[dict[str, Any]]:
    """The points of one evaluation: an artifact's `folder` and its predictions with their groups.

    A point has `strategy`, `answers` (an image), `known`, and for `base`, `novel` and `harmonic_mean`
    `low`, `high` and, where the two agree and both groups are there, the `interval` (95 %, for the
    draw of images) of the harmonic mean. Empty where no image was sampled in full.
    """
    if not list(folder.glob("rollouts-*.parquet")):
        return []
    labels = {row["image_id"]: row["label"] for row in rows}
    groups = {row["image_id"]: row["group"] for row in rows}
    by_mode: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_mode.setdefault(row["mode"], {})[row["image_id"]] = row
    votes = _votes(folder, labels, groups, card)
    most = max(votes)
    if any(votes[most][image].num_rollouts < most for image in labels):
        return []
    points: dict[str, Outcomes] = {}
    if "one_step" in by_mode:
        given = by_mode["one_step"]
        points["one step"] = {i: (r["correct"], r["correct"], 1) for i, r in given.items()}
    for count in (n for n in MAJORITIES if n <= most):
        points[f"majority of {count}"] = {
            i: (*[_leader(votes[count][i]) == label] * 2, count) for i, label in labels.items()
        }
    asked = by_mode.get("two_step", {})
    for k in OPTIONS if asked else ():
        points[f"two steps, {k} options"] = {
            i: _two_step(votes[most][i], k, asked[i], most) for i in labels
        }
    if "adaptive" in by_mode:
        used = {row["image_id"]: row for row in shards.read(folder, "adaptive_counts").to_pylist()}
        points["adaptive"] = {
            i: (r["correct"], r["correct"], used[i]["num_rollouts"] + (used[i]["num_options"] > 1))
            for i, r in by_mode["adaptive"].items()
        }
    elif asked:
        points["adaptive, thresholds not set"] = {
            i: _adaptive({n: votes[n][i] for n in votes if n in (*INSTALMENTS, most)}, asked[i])
            for i in labels
        }
    return [_point(name, outcomes, groups) for name, outcomes in points.items()]


def mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The mean of the curves of several seeds, point by point, of the strategies that all of them have."""
    by_name = [{point["strategy"]: point for point in curve} for curve in curves]
    points = []
    for name in by_name[0] if by_name else ():
        same = [curve[name] for curve in by_name if name in curve]
        if len(same) < len(by_name):
            continue
        point: dict[str, Any] = {"strategy": name}
        point |= {key: float(np.mean([each[key] for each in same])) for key in ("answers", "known")}
        for key in (*GROUPS, "harmonic_mean"):
            if all(key in each for each in same):
                point[key] = {
                    end: float(np.mean([each[key][end] for each in same]))
                    for end in ("low", "high")
                }
        points.append(point)
    return points


def _votes(
    folder: Path, labels: Mapping[str, int], groups: Mapping[str, str], card: Card
) -> dict[int, dict[str, Votes]]:
    """The votes of the first so many rollouts, by number and image."""
    recipe = folder / "recipe.json"
    values = json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else {}
    names = ClassNames.of(card)
    allowed = {group: set(range(len(card.classes))) for group in GROUPS}
    if values.get("prompt") == "closed_list":
        allowed = {g: {labels[i] for i in labels if groups[i] == g} for g in GROUPS}
    stored = int(max(shards.read(folder, "rollouts", ["rollout"])["rollout"].to_pylist())) + 1
    votes: dict[int, dict[str, Votes]] = {}
    for count in sorted({n for n in (*MAJORITIES, *INSTALMENTS) if n < stored} | {stored}):
        merged = {
            classes: merge_all(folder, names, set(classes), count)
            for classes in {frozenset(of_group) for of_group in allowed.values()}
        }
        votes[count] = {i: merged[frozenset(allowed[groups[i]])][i] for i in labels}
    return votes


def _leader(votes: Votes) -> int | None:
    return votes.candidates[0].class_id if votes.candidates else None


def _two_step(
    votes: Votes, k: int, asked: Mapping[str, Any], samples: int
) -> tuple[bool, bool, int]:
    """The outcome with the first `k` candidates as options, given the answer that was `asked` for."""
    offered = [candidate.class_id for candidate in votes.candidates[:k]]
    if len(offered) < 2:
        right = _leader(votes) == asked["label"]
        return right, right, samples
    if len(offered) == len(asked["options"]):
        return asked["correct"], asked["correct"], samples + 1
    return False, asked["label"] in offered, samples + 1


def _adaptive(by_count: Mapping[int, Votes], asked: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """The outcome under thresholds that need no setting: unanimous votes are the answer."""
    count, options = adaptive.decide(by_count, max(2, len(asked["options"])), Thresholds())
    votes, last = by_count[count], by_count[max(by_count)]
    same = [c.class_id for c in votes.candidates[:options]] == [
        c.class_id for c in last.candidates[:options]
    ]
    if options > 1 and not same:
        offered = [candidate.class_id for candidate in votes.candidates[:options]]
        return False, asked["label"] in offered, count + 1
    return _two_step(votes, options, asked, count)


def _point(name: str, outcomes: Outcomes, groups: Mapping[str, str]) -> dict[str, Any]:
    point: dict[str, Any] = {
        "strategy": name,
        "answers": float(np.mean([answers for *_, answers in outcomes.values()])),
        "known": float(np.mean([low == high for low, high, _ in outcomes.values()])),
    }
    parts = {
        group: [outcomes[i][:2] for i in sorted(outcomes) if groups[i] == group] for group in GROUPS
    }
    for group, flags in parts.items():
        if flags:
            low, high = np.mean(flags, axis=0).tolist()
            point[group] = {"low": low, "high": high}
    if all(parts.values()):
        ends: dict[str, Any] = {
            e: harmonic_mean(*(point[g][e] for g in GROUPS)) for e in ("low", "high")
        }
        if ends["low"] == ends["high"]:
            sure = [[low for low, _ in parts[group]] for group in GROUPS]
            ends["interval"] = list(bootstrap_harmonic_mean(*sure, seed=SEED))
        point["harmonic_mean"] = ends
    return point
