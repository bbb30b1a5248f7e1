"""Further rows of the comparison: near misses, answers and thoughts by accuracy, published figures."""

from collections.abc import Callable, Mapping
from typing import Any

from tasks.evaluation import published
from tasks.pages.text import in_order, label, percent

NEAR = (
    "The share in % of the wrong answers that lie in a group of the truth, such as its genus; after the "
    "stroke the mean depth, the share in % of the way to the truth that an answer gets right."
)
CURVE = (
    "Accuracy in % and answers an image, from the stored answers alone. Where a question with other "
    "options was never asked, the accuracy lies between two ends: all such answers wrong, and all right."
)

THOUGHTS = (
    "The mean length of the thought before an answer, and of all thoughts that a mode takes for an image, "
    "those of its samples included, beside the accuracy in %. A token is one of the policy's own."
)


def row_label(name: str) -> str:
    """A row's name on pages: the method, or the method after one of its rounds."""
    method, _, round_ = name.partition(", round ")
    return f"{label(method)}, round {round_}" if round_ else label(method)


def near_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """Near misses: a heading, then one row for each method; empty without a taxonomy."""
    by_row = table["near_misses"]
    modes = in_order(mode for by_mode in by_row.values() for mode in by_mode)
    rows = [["", *map(label, modes)]]
    for name, by_mode in by_row.items():
        cells = [by_mode.get(mode) for mode in modes]
        shown = [f"{percent(c['share'])} / {percent(c['depth'])}" if c else "–" for c in cells]
        rows.append([row_label(name), *shown])
    return rows if by_row else []


def budget_curve_rows(table: Mapping[str, Any]) -> list[list[str]]:
    """The curves: a heading, then one row for each method and strategy; empty without rollouts."""
    curves = table["budget_curves"]
    keys = ("base", "novel", "harmonic_mean")
    rows = [["", "strategy", "answers an image", *map(label, keys)]]
    for name, curve in curves.items():
        for point in curve:
            spans = [_span(point[key]) if key in point else "–" for key in keys]
            rows.append([row_label(name), point["strategy"], f"{point['answers']:.1f}", *spans])
    return rows if curves else []


def thought_rows(
    thoughts: Mapping[str, Mapping[str, Any]], accuracy: Callable[[str, str, str], float | None]
) -> list[list[str]]:
    """The lengths of thoughts: a heading, then one row for each method and mode; empty without any.

    `thoughts` are those of `tasks.evaluation.cost` by method. `accuracy` is called with a method, a
    mode, and base, novel or harmonic_mean.
    """
    keys = ("base", "novel", "harmonic_mean")
    rows = [["", "mode", "thought an answer", "thought an image", *map(label, keys)]]
    for name, found in thoughts.items():
        for mode in in_order(found.get("modes", {})):
            lengths = [
                f"{found['modes'][mode][key]:.1f} {found['unit']}" for key in ("answer", "image")
            ]
            shares = [percent(accuracy(name, mode, key)) for key in keys]
            rows.append([row_label(name), label(mode), *lengths, *shares])
    return rows if len(rows) > 1 else []


def compared_thoughts(table: Mapping[str, Any]) -> list[list[str]]:
    """The rows of `thought_rows` for one set of a comparison."""

    def accuracy(name: str, mode: str, key: str) -> float | None:
        return table["modes"].get(mode, {}).get(name, {}).get(key, {}).get("mean")

    return thought_rows(table.get("thoughts", {}), accuracy)


def _span(ends: Mapping[str, float]) -> str:
    low, high = percent(ends["low"]), percent(ends["high"])
    return low if low == high else f"{low} to {high}"


def published_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The published figures that stand beside the comparison's: a heading, then one row each."""
    keys = published.GROUPS
    rows = [["of", "", *map(label, keys), "note"]]
    for row in comparison["published"]:
        cells = [published.text(row[key]) if key in row else "" for key in keys]
        rows.append([row["of"], label(row["name"]), *cells, row.get("note", "")])
    return rows
