"""Builds the comparison page, one HTML file that opens offline; its template is `compare.html.jinja`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.evaluation import published
from tasks.pages import render
from tasks.pages.charts import Dot, dot_chart
from tasks.pages.compare_sections import (
    CURVE,
    NEAR,
    THOUGHTS,
    budget_curve_rows,
    compared_thoughts,
    near_rows,
    published_rows,
    row_label,
)
from tasks.pages.compare_tables import (
    BUDGET,
    OVER,
    SIGNIFICANCE,
    images_text,
    p_text,
    pair_rows,
    seeds_text,
    set_label,
)
from tasks.pages.report.figures import axis_of
from tasks.pages.text import label, percent, title_of


def compare_page(comparison: Mapping[str, Any]) -> str:
    """The page as HTML, from the contents of `compare.json`."""
    sets = ", ".join(set_label(table) for table in comparison["sets"])
    return render(
        "compare.html.jinja",
        title=f"{len(comparison['rows'])} policies on {sets}",
        warnings=comparison.get("warnings", ()),
        seeds=seeds_text(comparison),
        over_datasets=[
            _table(mode, by_row, OVER)
            for mode, by_row in (comparison["over_datasets"] or {}).items()
        ],
        sets=[_set(comparison, table, number) for number, table in enumerate(comparison["sets"])],
        sure=SIGNIFICANCE,
        budgets=_budgets(comparison),
        published=published_rows(comparison) if comparison.get("published") else [],
        protocol=f"{published.PROTOCOL} Source: {published.SOURCE}.",
    )


def _set(comparison: Mapping[str, Any], table: Mapping[str, Any], number: int) -> dict[str, Any]:
    modes = table["modes"].items()
    return {
        "name": set_label(table),
        "images": images_text(table),
        "charts": [_chart(f"set{number}-{mode}", mode, by_row) for mode, by_row in modes],
        "tables": [
            _table(mode, by_row, {key: label(key) for key in next(iter(by_row.values()))})
            for mode, by_row in modes
        ],
        "further": [
            {"title": title, "about": about, "grid": rows}
            for title, about, rows in (
                ("Roughly right", NEAR, near_rows(table)),
                ("What so many answers buy", CURVE, budget_curve_rows(table)),
                ("How long it thinks", THOUGHTS, compared_thoughts(table)),
            )
            if rows
        ],
        "pairs": [
            {
                "mode": mode,
                "heads": head[1:],
                "rows": [(row[0], [_pair(text) for text in row[1:]]) for row in body],
            }
            for mode, (head, *body) in pair_rows(comparison, table).items()
        ],
    }


def _chart(key: str, mode: str, by_row: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    last = list(next(iter(by_row.values())))[-1]
    rows, ends = [], []
    for index, (name, figures) in enumerate(by_row.items()):
        low, high = figures[last]["interval"]
        ends += [100 * low, 100 * high]
        style = 0 if index == 0 else 1
        rows.append(
            (row_label(name), [Dot("", 100 * figures[last]["mean"], 100 * low, 100 * high, style)])
        )
    description = "; ".join(f"{name}: {dots[0].value:.1f} %" for name, dots in rows)
    drawn = dot_chart(key, title_of(mode), description, rows, axis_of(ends), left=112)
    return {"mode": mode, "key": last, "drawn": drawn}


def _table(
    mode: str, by_row: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]
) -> dict[str, Any]:
    present = [key for key in keys if key in next(iter(by_row.values()))]
    compared = present[-1]
    rows = []
    for name, figures in by_row.items():
        change = figures[compared].get("difference")
        cells = [
            {**figures[key], "by_seed": ", ".join(percent(v) for v in figures[key]["by_seed"])}
            for key in present
        ]
        p = p_text(change) if change else ""
        rows.append({"name": row_label(name), "figures": cells, "difference": change, "p": p})
    heads = [*(keys[key] for key in present), f"difference in {keys[compared]}", "p"]
    return {"mode": mode, "heads": heads, "rows": rows}


def _pair(text: str) -> tuple[str, bool]:
    """A cell of the grid of methods, and whether it is bold."""
    return text.strip("*"), text.startswith("**")


def _budgets(comparison: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "unequal": "; ".join(comparison["unequal"]),
        "heads": list(BUDGET.values()),
        "rows": [
            {
                "name": row_label(name),
                "set": trained_on,
                "amounts": [_amount(spent.get(what, 0)) for what in BUDGET],
            }
            for trained_on, by_row in comparison["budgets"].items()
            for name, spent in by_row.items()
        ],
    }


def _amount(amount: int | Sequence[int]) -> str:
    return f"{amount:,}" if isinstance(amount, int) else " / ".join(f"{n:,}" for n in amount)
