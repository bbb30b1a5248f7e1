"""The comparison as one page that opens offline, in the report's style."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.charts import Dot, dot_chart
from tasks.compare_tables import (
    BUDGET,
    OVER,
    SURE,
    p_told,
    pair_rows,
    row_label,
    seeds_told,
    set_label,
)
from tasks.report_figures import axis_of
from tasks.report_style import page
from tasks.report_text import esc, label, percent, points, signs, title_of


def compare_page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    methods = [row_label(row["name"]) for row in found["rows"]]
    places = ", ".join(set_label(table) for table in found["sets"])
    seeds = seeds_told(found)
    title = f"{len(methods)} policies on {places}"
    parts = [
        f'<header><p class="eyebrow">Comparison</p><h1>{esc(title)}</h1>'
        f'<p class="lead">Accuracy in %, {esc(seeds)}. Every policy answers '
        "the same test images, and an answer that cannot be read counts as wrong.</p></header><main>"
    ]
    if found["over_datasets"]:
        tables = "".join(
            f"<h3>{esc(title_of(mode))}</h3>{_table(by_row, OVER)}"
            for mode, by_row in found["over_datasets"].items()
        )
        parts.append(
            '<section><h2>Over datasets</h2><p class="quiet">Every dataset counts the same. The mean '
            "of harmonic means and the harmonic mean of means are two figures: both stand here."
            f"</p>{tables}</section>"
        )
    for number, table in enumerate(found["sets"]):
        shown = _set(table, number) + _pairs(pair_rows(found, table))
        parts.append(f"<section><h2>{esc(set_label(table))}</h2>{shown}</section>")
    parts.append(
        f"<section><h2>What each method spent</h2>{_budgets(found)}</section></main><footer>"
        "Small figures: ± standard deviation over seeds, and 95 % intervals for the draw of test "
        "images (bootstrap, paired for differences). p: exact sign-flip test over images for a group, "
        "bootstrap for harmonic means, adjusted over the datasets (Holm).</footer>"
    )
    return page(title, "".join(parts))


def _set(table: Mapping[str, Any], number: int) -> str:
    counts = " and ".join(f"{n:,} {esc(group)}" for group, n in table["images"].items())
    charts = "".join(
        _chart(f"set{number}-{mode}", mode, by_row) for mode, by_row in table["modes"].items()
    )
    tables = "".join(
        f"<h3>{esc(title_of(mode))}</h3>{_table(by_row, {key: label(key) for key in next(iter(by_row.values()))})}"
        for mode, by_row in table["modes"].items()
    )
    return f'<p>{counts} test images.</p><div class="charts">{charts}</div>{tables}'


def _chart(key: str, mode: str, by_row: Mapping[str, Mapping[str, Any]]) -> str:
    last = list(next(iter(by_row.values())))[-1]
    rows, ends = [], []
    for index, (name, figures) in enumerate(by_row.items()):
        low, high = figures[last]["interval"]
        ends += [100 * low, 100 * high]
        style = 0 if index == 0 else 1
        rows.append(
            (row_label(name), [Dot("", 100 * figures[last]["mean"], 100 * low, 100 * high, style)])
        )
    told = "; ".join(f"{name}: {dots[0].value:.1f} %" for name, dots in rows)
    chart = dot_chart(key, title_of(mode), told, rows, axis_of(ends), left=112)
    caption = f"<b>{esc(title_of(mode))}</b><span>{esc(label(last))}, with 95 % intervals</span>"
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _table(by_row: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]) -> str:
    present = [key for key in keys if key in next(iter(by_row.values()))]
    compared = present[-1]
    heads = [*(keys[key] for key in present), f"difference in {keys[compared]}", "p"]
    head = "".join(f"<th>{esc(text)}</th>" for text in ("", *heads))
    lines = []
    for name, figures in by_row.items():
        cells = [_cell(figures[key]) for key in present]
        change = figures[compared].get("difference")
        cells.append(_change(change) if change else "<td></td>")
        cells.append(f"<td>{esc(p_told(change))}</td>" if change else "<td></td>")
        lines.append(f"<tr><th>{esc(row_label(name))}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="results many flat"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _pairs(grids: Mapping[str, Sequence[Sequence[str]]]) -> str:
    """Every method against every other; folds out."""
    if not grids:
        return ""
    tables = []
    for mode, (head, *body) in grids.items():
        heads = "".join(f'<th class="n">{esc(text)}</th>' for text in head[1:])
        lines = "".join(
            f"<tr><th>{esc(row[0])}</th>{''.join(map(_pair, row[1:]))}</tr>" for row in body
        )
        tables.append(
            f'<h4>{esc(title_of(mode))}</h4><div class="wide"><table><thead><tr><th></th>{heads}</tr>'
            f"</thead><tbody>{lines}</tbody></table></div>"
        )
    return (
        "<details><summary>Between methods</summary><p>Harmonic mean of the row less that of the "
        f"column, in points; bold where Holm’s p is below {SURE}.</p>{''.join(tables)}</details>"
    )


def _pair(text: str) -> str:
    bold = text.startswith("**")
    shown = esc(text.strip("*"))
    return f'<td class="n">{f"<b>{shown}</b>" if bold else shown}</td>'


def _cell(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    spread = f"±{percent(figure['spread'])}, " if figure["spread"] is not None else ""
    seeds = ", ".join(percent(value) for value in figure["by_seed"])
    return (
        f'<td title="by seed: {esc(seeds)}"><span>{percent(figure["mean"])}</span>'
        f"<small>{spread}{percent(low)}–{percent(high)}</small></td>"
    )


def _change(change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    style = "sure up" if low > 0 else "sure down" if high < 0 else ""
    told = f'<span class="{style}">{points(change["mean"])}</span>'
    return f"<td>{signs(told)}<small>{signs(f'{points(low)} to {points(high)}')}</small></td>"


def _budgets(found: Mapping[str, Any]) -> str:
    head = "".join(f'<th class="n">{esc(text)}</th>' for text in BUDGET.values())
    lines = []
    for place, by_row in found["budgets"].items():
        for name, spent in by_row.items():
            cells = "".join(f'<td class="n">{_amount(spent.get(what, 0))}</td>' for what in BUDGET)
            lines.append(
                f"<tr><th>{esc(row_label(name))}<br><small>{esc(place)}</small></th>{cells}</tr>"
            )
    told = (
        f'<p class="note">Not equal: {esc("; ".join(found["unequal"]))}.</p>'
        if found["unequal"]
        else "<p>Rollouts, optimiser steps and completions are equal for all methods that use them.</p>"
    )
    return (
        f'{told}<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _amount(amount: int | Sequence[int]) -> str:
    return f"{amount:,}" if isinstance(amount, int) else " / ".join(f"{n:,}" for n in amount)
