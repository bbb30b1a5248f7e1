"""The comparison as LaTeX tables for a paper, from the contents of `compare.json` alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.evaluation import published
from tasks.pages.compare_sections import THOUGHTS, compared_thoughts, published_rows
from tasks.pages.compare_tables import OVER, budget_rows, counts_text, keys_of, row_label, set_label
from tasks.pages.text import percent, title_of


def latex(comparison: Mapping[str, Any]) -> str:
    """Tables for each set, over all sets, of thoughts and of budgets; they need the package booktabs."""
    parts = ["% needs \\usepackage{booktabs}"]
    parts += [rf"\textbf{{\large {_tex(line)}}}" for line in comparison.get("warnings", ())]
    for table in comparison["sets"]:
        keys = keys_of(table["modes"])
        caption = f"{set_label(table)}: {counts_text(table)} Seeds: {', '.join(map(str, table['seeds']))}."
        parts.append(
            _tabular(
                comparison,
                table["modes"],
                dict(zip(keys, map(title_of, keys), strict=True)),
                caption,
            )
        )
    if comparison["over_datasets"]:
        caption = f"Over {len(comparison['sets'])} datasets, each counting the same."
        parts.append(_tabular(comparison, comparison["over_datasets"], OVER, caption))
    grids = [
        (rows, f"How long it thinks on {set_label(table)}. {THOUGHTS}")
        for table in comparison["sets"]
        if (rows := compared_thoughts(table))
    ]
    grids.append((budget_rows(comparison), "Budgets."))
    if comparison.get("published"):
        caption = f"Published. {published.PROTOCOL} Source: {published.SOURCE}."
        grids.insert(0, (published_rows(comparison), caption))
    for (head, *body), caption in grids:
        columns = "".join(
            "r" if _all_figures(column) else "l" for column in zip(*body, strict=True)
        )
        lines = [" & ".join(map(_tex, row)) + r" \\" for row in body]
        parts.append(_floating(columns, [" & ".join(map(_tex, head)) + r" \\"], lines, caption))
    return "\n\n".join(parts) + "\n"


def _tabular(
    comparison: Mapping[str, Any],
    modes: Mapping[str, Mapping[str, Any]],
    keys: Mapping[str, str],
    caption: str,
) -> str:
    """One table: a row for each method, a column for each figure of each mode; the best is bold."""
    present = [key for key in keys if key in keys_of(modes)]
    best = {
        (mode, key): max(percent(figures[key]["mean"]) for figures in by_row.values())
        for mode, by_row in modes.items()
        for key in present
    }
    head = ["", *(rf"\multicolumn{{{len(present)}}}{{c}}{{{_tex(title_of(m))}}}" for m in modes)]
    names = ["", *(_tex(keys[key]) for _ in modes for key in present)]
    lines = []
    for row in comparison["rows"]:
        cells = [_tex(row_label(row["name"]))]
        for mode, by_row in modes.items():
            for key in present:
                figure = by_row.get(row["name"], {}).get(key)
                shown = percent(figure["mean"]) if figure else "--"
                bold = figure and shown == best[mode, key]
                spread = figure and figure["spread"] is not None
                tail = rf" {{\scriptsize$\pm${percent(figure['spread'])}}}" if spread else ""
                cells.append((rf"\textbf{{{shown}}}" if bold else shown) + tail)
        lines.append(" & ".join(cells) + r" \\")
    heads = [" & ".join(head) + r" \\", " & ".join(names) + r" \\"]
    return _floating("l" + "r" * (len(names) - 1), heads, lines, caption)


def _all_figures(column: Sequence[str]) -> bool:
    """Whether the cells of a column that are not empty hold figures, which are set to the right."""
    return all(cell[:1].isdigit() for cell in column if cell)


def _floating(columns: str, heads: Sequence[str], lines: Sequence[str], caption: str) -> str:
    body = [r"\toprule", *heads, r"\midrule", *lines, r"\bottomrule"]
    inner = "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])
    return "\n".join(
        [r"\begin{table}[t]", r"\centering", rf"\caption{{{_tex(caption)}}}", inner, r"\end{table}"]
    )


def _tex(text: str) -> str:
    escaped = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escaped.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
