"""Template values for the report's changes: confusions, single classes, refreshes, other test sets."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tasks.pages.text import percent


def confusion_tables(confusions: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs of classes that the policy confuses less, and pairs that it confuses more, after training."""
    if not confusions or not (confusions["resolved"] or confusions["introduced"]):
        return {}
    most = max(
        max(pair["before"], pair["after"])
        for pair in (*confusions["resolved"], *confusions["introduced"])
    )
    pairs = {
        kind: [
            {
                **pair,
                "before_width": f"{100 * pair['before'] / most:.0f}",
                "after_width": f"{100 * pair['after'] / most:.0f}",
            }
            for pair in confusions[kind]
        ]
        for kind in ("resolved", "introduced")
    }
    return {**confusions, **pairs}


def class_table(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], mode: str
) -> dict[str, Any]:
    """Accuracy of single classes, the largest gain first."""
    if not rows or len(names) < 2:
        return {}
    lines = [
        {
            "name": row["class"],
            "group": row["group"],
            "images": row["images"],
            "shares": [right / row["images"] for right in row["right"]],
            "change": (row["right"][-1] - row["right"][0]) / row["images"],
        }
        for row in rows
    ]
    lines.sort(key=lambda line: (-line["change"], line["name"]))
    return {"names": names, "mode": mode, "rows": lines}


def refresh_changes(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[Any, str]]:
    """(round, a sentence on what its refresh changed); empty where there is only one round."""
    sentences = []
    for before, after in pairwise(rounds):
        then, now = before["refresh"], after["refresh"]
        parts = []
        if None not in (then.get("truth_share"), now.get("truth_share")):
            parts.append(
                f"of all rollouts {percent(now['truth_share'])} % name the truth, "
                f"{_before(percent(then['truth_share']), percent(now['truth_share']))}"
            )
        if None not in (then.get("entropy"), now.get("entropy")):
            was, is_ = f"{then['entropy']:.2f}", f"{now['entropy']:.2f}"
            parts.append(f"the votes’ entropy is {is_} nats, {_before(was, is_)}")
        if now.get("kept_questions") is not None:
            kept, changed = now["kept_questions"], now["changed_options"]
            gone = then["questions"] - kept
            parts.append(
                f"{gone:,} of {then['questions']:,} images need no question any more, "
                f"{now['new_questions']:,} have one for the first time, and of the {kept:,} that "
                f"have one again {changed:,} get other options"
            )
        if then.get("asked"):
            parts.append(
                f"in round {before['round']} {then['solved']:,} of {then['asked']:,} questions asked "
                "were answered right by all of their last answers"
            )
        if parts:
            sentences.append((after["round"], "; ".join(parts)))
    return sentences


def _before(then: str, now: str) -> str:
    return "as before" if then == now else f"{then} before"


def cross_table(cross: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy by training set and test set: the harmonic mean, or that of the only group."""
    if not cross:
        return {}
    sets = sorted({entry["set"] for entry in cross})
    rows = dict.fromkeys((entry["trained_on"], entry["name"]) for entry in cross)
    figures = {(e["trained_on"], e["name"], e["set"]): e["figure"] for e in cross}
    return {
        "key": cross[0]["key"],
        "mode": cross[0]["mode"],
        "sets": sets,
        "rows": [
            {
                "method": method,
                "trained_on": trained,
                "figures": [figures.get((trained, method, name)) for name in sets],
            }
            for trained, method in rows
        ],
    }
