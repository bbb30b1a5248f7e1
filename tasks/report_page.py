"""The report as one HTML file that opens offline: the answer first, then how it came about.

No script, no web font: a strict content policy allows images as data: URIs and the page's own style
sheet, and nothing else; the gallery's filters are style rules. Whatever a model or a file wrote
goes through `esc`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.figures import Figure, legend, on_page
from tasks.report_changed import class_table, confusion_tables, cross_table, refresh_changes
from tasks.report_figures import policies
from tasks.report_graph import graph_svg
from tasks.report_log import FIRST
from tasks.report_style import page
from tasks.report_tables import (
    judged_table,
    refresh_table,
    results_table,
    stages_table,
    status_list,
)
from tasks.report_text import SPOKEN_MODES, esc, label, percent, points, signs, title_of, verdict

MINIATURE = (
    "This is a miniature: its images are drawn by a program, so that the whole method runs in "
    "minutes without a GPU. It shows the method at work and makes no claim about 7B models or "
    "photographs."
)


def build_page(
    metrics: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]], gallery: str, command: str
) -> str:
    """The whole page.

    `figures` are the lists `accuracy`, `pass`, `rounds`, `log` and `changes`; `gallery` is ready HTML;
    `command` is the line that makes the report again.
    """
    card = metrics["card"]
    method = metrics["evaluations"][min(1, len(metrics["evaluations"]) - 1)]["name"]
    title = f"{label(method)} on {card['name']}"
    headline, details = verdict(metrics)
    small = f'<p class="note">{MINIATURE}</p>' if card["source_kind"] == "drawn" else ""
    body = "".join(
        (
            f'<header><p class="eyebrow">{esc(title)}</p><h1>{esc(headline)}</h1>',
            _tiles(metrics),
            *(f'<p class="lead">{esc(line)}</p>' for line in details),
            f"{small}</header><main>",
            _section("The answer", _answer(metrics, figures["accuracy"])),
            _section("How training went", _training(metrics, figures)),
            _section("What changed", _changes(metrics, figures["changes"])),
            _section("Test images", gallery),
            _section("How it was made", _made(metrics["stages"], command)),
            f"</main><footer>{_footer(metrics)}</footer>",
        )
    )
    return page(title, body)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _tiles(metrics: Mapping[str, Any]) -> str:
    """The differences in big figures: base, novel, harmonic mean, asked once (or as it was asked)."""
    if len(metrics["evaluations"]) < 2:
        return ""
    first, other = metrics["evaluations"][:2]
    modes = [m for m in (*SPOKEN_MODES, *metrics["modes"]) if m in other["modes"]]
    if not modes or "difference" not in other["modes"][modes[0]]:
        return ""
    mode = modes[0]
    tiles = []
    for key, change in other["modes"][mode]["difference"].items():
        low, high = change["interval"]
        sure = "up" if low > 0 else "down" if high < 0 else ""
        word = {"up": "▲ sure to 95 %", "down": "▼ sure to 95 %", "": "may be chance"}[sure]
        was, is_ = (e["modes"][mode][key]["accuracy"] for e in (first, other))
        tiles.append(
            f'<li><span class="what">{esc(label(key))}</span>'
            f'<span class="big {sure}">{signs(points(change["mean"]))}</span>'
            f"<span>{percent(was)} → {percent(is_)}</span>"
            f"<span>{signs(f'{points(low)} to {points(high)}')}</span>"
            f'<span class="{sure}">{word}</span></li>'
        )
    told = f"{title_of(mode)}, in points of accuracy, with 95 % intervals of the paired difference"
    return f'<ul class="tiles">{"".join(tiles)}</ul><p class="quiet">{esc(told)}</p>'


def _answer(metrics: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    images = metrics["images"]
    counts = " and ".join(
        f"{n:,} images of {images['classes'].get(group, 0)} {group} classes"
        for group, n in images["groups"].items()
    )
    left_out = images["test_images_in_all"] - images["in_split"].get("test", 0)
    note = f" ({left_out:,} test images of the split were not evaluated)" if left_out > 0 else ""
    if set(images["in_split"]) == {"val"}:
        note = " (validation images, for tuning: no result)"
    return (
        f"<p>Accuracy in % over {counts}{note}. Every policy answers the same images in every "
        "mode, and an answer that cannot be read counts as wrong.</p>"
        f"{legend(policies(metrics['evaluations']), dots=True)}{_charts(figures, with_key=False)}"
        f"{results_table(metrics)}{judged_table(metrics)}{cross_table(metrics['cross'])}{status_list(metrics)}"
    )


def _training(metrics: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]]) -> str:
    log = figures["log"]
    first = [figure for figure in log if figure.title in FIRST]
    rest = [figure for figure in log if figure.title not in FIRST]
    more = f"<details><summary>More of the training log</summary>{_charts(rest)}</details>"
    return "".join(
        (
            _charts([*figures["pass"], *first, *figures["rounds"]]),
            more if rest else "",
            refresh_changes(metrics["rounds"]),
            refresh_table(metrics["rounds"]),
        )
    )


def _changes(metrics: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    confusions = metrics.get("confusions") or {}
    names = [e["name"] for e in metrics["evaluations"][:2]]
    return "".join(
        (
            _charts(figures, top=True),
            confusion_tables(confusions),
            class_table(metrics["classes"], names, confusions.get("mode", "")),
        )
    )


def _charts(figures: Sequence[Figure], *, with_key: bool = True, top: bool = False) -> str:
    if not figures:
        return ""
    shown = "".join(on_page(figure, with_key=with_key) for figure in figures)
    return f'<div class="charts{" top" * top}">{shown}</div>'


def _made(stages: Sequence[dict[str, Any]], command: str) -> str:
    again = (
        f"<p>Everything below, again, from the same settings:</p><pre>{esc(command)}</pre>"
        if command
        else ""
    )
    graph = graph_svg(stages)
    drawn = f'<div class="wide">{graph}</div>' if graph else ""
    return f"{again}{drawn}{stages_table(stages)}" if stages else again


def _footer(metrics: Mapping[str, Any]) -> str:
    card, duplicates = metrics["card"], metrics["images"].get("duplicates", {})
    told = (
        f"Images: data card {card['name']}, version {card['version']}, licence {card['license']}."
    )
    if not card["redistribute"]:
        told += " They may not be passed on, so keep this page to yourself."
    for pair, count in duplicates.items():
        told += f" {count:,} images: {pair} (duplicates.parquet of Split)."
    return esc(told)
