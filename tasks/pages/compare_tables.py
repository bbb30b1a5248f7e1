"""The comparison as Markdown, CSV and plain text, from the contents of `compare.json` alone."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.evaluation import published
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
from tasks.pages.text import label, p_value, percent, points, signs, title_of

OVER = {
    "mean_base": "mean of base",
    "mean_novel": "mean of novel",
    "mean_of_harmonic_means": "mean of harmonic means",
    "harmonic_mean_of_means": "harmonic mean of means",
}
BUDGET = {
    "rollouts": "rollouts proposed",
    "optimiser_steps": "optimiser steps",
    "completions": "completions trained on",
    "questions_built": "questions built",
    "questions_asked": "questions asked",
}
SIGNIFICANCE = 0.05  # differences with a smaller p value are bold


def p_text(change: Mapping[str, Any]) -> str:
    """The p value of a difference as text, adjusted (Holm) where it is one of several."""
    return p_value(change.get("p_holm", change["p"]))


def seeds_text(comparison: Mapping[str, Any]) -> str:
    """The seeds in words: "mean over training seeds 0, 1, 2", or "training seed 0"."""
    seeds = ", ".join(map(str, comparison["seeds"]))
    return (
        f"mean over training seeds {seeds}"
        if len(comparison["seeds"]) > 1
        else f"training seed {seeds}"
    )


def set_label(table: Mapping[str, Any]) -> str:
    """A set's name, with the training set where that is another, a mix."""
    name, trained = table["set"], table["trained_on"]
    return name if name == trained else f"{name} (trained on {trained})"


def markdown(comparison: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    baseline = row_label(comparison["rows"][0]["name"])
    parts = [
        "# Comparison",
        *(f"## {line}" for line in comparison.get("warnings", ())),
        f"Accuracy in %, {seeds_text(comparison)}; in brackets 95 % intervals for the draw of "
        f"test images. Differences are paired, image by image, from the {baseline}; p is adjusted "
        "over the datasets (Holm). ± is the standard deviation over seeds.",
    ]
    for table in comparison["sets"]:
        parts.append(f"## {set_label(table)}\n\n{counts_text(table)}")
        for mode, by_row in table["modes"].items():
            parts.append(f"### {title_of(mode)}\n\n{_grid(_mode_rows(by_row))}")
        if near := near_rows(table):
            parts.append(f"### Roughly right\n\n{NEAR}\n\n{_grid(near)}")
        if curves := budget_curve_rows(table):
            parts.append(f"### What so many answers buy\n\n{CURVE}\n\n{_grid(curves)}")
        if thoughts := compared_thoughts(table):
            parts.append(f"### How long it thinks\n\n{THOUGHTS}\n\n{_grid(thoughts)}")
        if pairs := pair_rows(comparison, table):
            parts.append(
                "### Between methods\n\nHarmonic mean of the row less that of the column, in points; "
                f"bold where Holm's p < {SIGNIFICANCE}.\n"
            )
            parts += [f"{title_of(mode)}\n\n{_grid(rows)}" for mode, rows in pairs.items()]
    if comparison["over_datasets"]:
        parts.append("## Over datasets\n\nEvery dataset counts the same, whatever its size.")
        for mode, by_row in comparison["over_datasets"].items():
            parts.append(f"### {title_of(mode)}\n\n{_grid(_over_rows(by_row))}")
    if comparison.get("published"):
        rows = _grid(published_rows(comparison))
        parts.append(f"## Published\n\n{published.PROTOCOL} Source: {published.SOURCE}.\n\n{rows}")
    parts.append(f"## What each method spent\n\n{_budget_text(comparison)}")
    return "\n\n".join(parts) + "\n"


def csv_table(comparison: Mapping[str, Any]) -> str:
    """One line for each figure: set, mode, row, group and seed (`mean` for the mean over seeds).

    Published figures have the mode `published`. Lengths of thoughts are figures such as `thought_answer_tokens`.
    """
    buffer = io.StringIO()
    columns = [
        *("set", "trained_on", "mode", "row", "figure", "seed", "value", "low", "high", "spread"),
        *("difference", "difference_low", "difference_high", "p", "p_holm", "images"),
    ]
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    tables = [
        (t["set"], t["trained_on"], t["modes"], t["images"], t["seeds"]) for t in comparison["sets"]
    ]
    if comparison["over_datasets"]:
        tables.append(("all", "all", comparison["over_datasets"], {}, comparison["seeds"]))
    for name, trained, modes, images, seeds in tables:
        for mode, by_row in modes.items():
            for row, figures in by_row.items():
                for key, figure in figures.items():
                    keys = {
                        "set": name,
                        "trained_on": trained,
                        "mode": mode,
                        "row": row,
                        "figure": key,
                    }
                    keys["images"] = images.get(key, sum(images.values()) or "")
                    change = figure.get("difference")
                    writer.writerow(
                        keys
                        | {"seed": "mean", "value": figure["mean"], "spread": figure["spread"]}
                        | dict(zip(("low", "high"), figure["interval"], strict=True))
                        | (_csv_change(change) if change else {})
                    )
                    for index, seed in enumerate(seeds):
                        own = {"seed": seed, "value": figure["by_seed"][index]}
                        if change:
                            own["difference"] = change["by_seed"][index]
                        writer.writerow(keys | own)
    for table in comparison["sets"]:
        for row, found in table.get("thoughts", {}).items():
            for mode, lengths in found["modes"].items():
                keys = {"set": table["set"], "trained_on": table["trained_on"], "mode": mode}
                for of, value in lengths.items():
                    figure = {"figure": f"thought_{of}_{found['unit']}", "seed": "mean"}
                    writer.writerow(keys | {"row": row, "value": value} | figure)
    for row in comparison.get("published", []):
        keys = {"set": row["of"], "mode": "published", "row": row["name"]}
        for key in (key for key in published.GROUPS if key in row):
            value = round(row[key] / 100, 6)
            writer.writerow(keys | {"figure": key, "value": value})
    return buffer.getvalue()


def summary(comparison: Mapping[str, Any]) -> str:
    """Each set's tables as plain text, which a run prints at its end."""
    parts = list(comparison.get("warnings", ()))
    for table in comparison["sets"]:
        parts.append(f"{set_label(table)}: {counts_text(table)}")
        for mode, rows in table["modes"].items():
            parts.append(f"{title_of(mode)}\n{_plain(_mode_rows(rows))}")
    for mode, by_row in comparison["over_datasets"].items():
        parts.append(f"over datasets, {title_of(mode).lower()}\n{_plain(_over_rows(by_row))}")
    if comparison.get("published"):
        rows = _plain(published_rows(comparison))
        parts.append(f"published ({published.SOURCE}; judged, on val images)\n{rows}")
    parts += [f"unequal budget: {line}" for line in comparison["unequal"]]
    return "\n\n".join(parts).replace("−", "-")  # a terminal keeps its hyphens


def _csv_change(change: Mapping[str, Any]) -> dict[str, Any]:
    low, high = change["interval"]
    return {
        "difference": change["mean"],
        "difference_low": low,
        "difference_high": high,
        "p": change["p"],
        "p_holm": change.get("p_holm", ""),
    }


def _mode_rows(by_row: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table of one mode on one set: a heading, then one row for each method."""
    keys = list(next(iter(by_row.values())))
    last = keys[-1]
    rows = [["", *map(label, keys), f"difference in {label(last)}", "p", "by seed"]]
    for name, figures in by_row.items():
        cells = [_cell(figures[key]) for key in keys]
        change = figures[last].get("difference")
        change_cells = [_cell(change, points), p_text(change)] if change else ["", ""]
        seeds = ", ".join(percent(value) for value in figures[last]["by_seed"])
        rows.append([row_label(name), *cells, *change_cells, seeds])
    return rows


def _over_rows(by_row: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    keys = [key for key in OVER if key in next(iter(by_row.values()), {})]
    rows = [["", *(OVER[key] for key in keys), *(f"difference in {OVER[k]}" for k in keys[2:])]]
    for name, figures in by_row.items():
        changes = [figures[key].get("difference") for key in keys[2:]]
        change_cells = [_cell(change, points) if change else "" for change in changes]
        rows.append([row_label(name), *(_cell(figures[key]) for key in keys), *change_cells])
    return rows


def pair_rows(
    comparison: Mapping[str, Any], table: Mapping[str, Any]
) -> dict[str, list[list[str]]]:
    """Mode -> grid of the differences in harmonic mean (or in the only group) between every two methods.

    Empty for fewer than three rows.
    """
    names = [row["name"] for row in comparison["rows"]]
    if len(names) < 3:
        return {}
    grids = {}
    for mode, pairs in table.get("pairs", {}).items():
        key = keys_of({mode: table["modes"][mode]})[-1]
        by_pair = {(p["from"], p["to"]): p for p in pairs if p["key"] == key}
        rows = [["", *map(row_label, names[:-1])]]
        for index, name in enumerate(names[1:], 1):
            cells = [by_pair.get((other, name)) for other in names[:-1]]
            shown = [
                _bold_where_significant(cell) if cell and i < index else ""
                for i, cell in enumerate(cells)
            ]
            rows.append([row_label(name), *shown])
        grids[mode] = rows
    return grids


def _bold_where_significant(change: Mapping[str, Any]) -> str:
    text = signs(points(change["mean"]))
    return f"**{text}**" if change["p_holm"] < SIGNIFICANCE else text


def budget_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    rows = [["trained on", "", *BUDGET.values()]]
    for trained_on, by_row in comparison["budgets"].items():
        for name, spent in by_row.items():
            amounts = [_amount(spent.get(what, 0)) for what in BUDGET]
            rows.append([trained_on, row_label(name), *amounts])
    return rows


def _budget_text(comparison: Mapping[str, Any]) -> str:
    text = _grid(budget_rows(comparison))
    if comparison["unequal"]:
        return text + "\n\nNot equal: " + "; ".join(comparison["unequal"]) + "."
    return (
        text
        + "\n\nRollouts, optimiser steps and completions are equal for all methods that use them."
    )


def _amount(amount: int | Sequence[int]) -> str:
    return f"{amount:,}" if isinstance(amount, int) else " / ".join(f"{n:,}" for n in amount)


def images_text(table: Mapping[str, Any]) -> str:
    """The evaluated images by group, and the part of the split that they are of."""
    parts = table.get("parts", {})
    one = len({*parts.values()}) < 2
    counts = [
        f"{count:,} {group}" + ("" if one else f" {parts[group]}")
        for group, count in table["images"].items()
    ]
    part = f" {next(iter(parts.values()), 'test')}" if one else ""
    return f"{' and '.join(counts)}{part} images"


def counts_text(table: Mapping[str, Any]) -> str:
    if table["same_images_for_all_seeds"]:
        return f"{images_text(table)}, the same for every method and seed."
    return (
        f"{images_text(table)} in all; each seed has a split of its own, the same for every method."
    )


def keys_of(modes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(next(iter(next(iter(modes.values())).values())))


def _cell(figure: Mapping[str, Any], form: Callable[[float], str] = percent) -> str:
    low, high = figure["interval"]
    spread = f" ±{percent(figure['spread'])}" if figure["spread"] is not None else ""
    return signs(f"{form(figure['mean'])}{spread} [{form(low)}, {form(high)}]")


def _grid(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def _plain(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
