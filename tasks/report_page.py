"""The report as one HTML file that opens offline: the answer first, then how it came about.

No script, no web font, no link to follow: a strict content policy allows images as data: URIs and
the page's own style sheet, and nothing else. Whatever a model or a file wrote goes through `esc`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.charts import Dot, Point, Series, dot_chart, line_chart, smooth, thin
from tasks.report_style import STYLE
from tasks.report_tables import refresh_table, results_table, stages_table, status_list
from tasks.report_text import esc, label, verdict

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
MINIATURE = (
    "This is a miniature: its images are drawn by a program, so that the whole method runs in "
    "minutes without a GPU. It shows the method at work and makes no claim about 7B models or "
    "photographs."
)
MODE_NOTES = {
    "one_step": "one greedy answer to the open question",
    "two_step": "a choice among its most sampled answers",
    "majority": "the most voted of its sampled answers",
}
STYLES = 5  # line styles in the style sheet; more policies than that start over


@dataclass(frozen=True)
class LogChart:
    """One chart of the training log: its columns with their names, and how to scale them."""

    title: str
    note: str
    columns: tuple[tuple[str, str], ...]
    factor: float = 1
    unit: str = ""


LOG_CHARTS = (
    LogChart(
        "Reward",
        "parts of the reward, mean over a step",
        (("letter_reward", "right letter"), ("format_reward", "right format")),
    ),
    LogChart("Completion length", "tokens, mean over a step", (("completion_length", "length"),)),
    LogChart(
        "Dead groups",
        "groups in which all earn the same",
        (("dead_group_share", "share"),),
        100,
        " %",
    ),
    LogChart("KL divergence", "from where the round began", (("kl", "KL"),)),
)


def build_page(metrics: dict[str, Any], logs: Sequence[list[dict]], gallery: str) -> str:
    """The whole page; `logs` are the training logs by round, `gallery` is ready HTML."""
    card = metrics["card"]
    method = metrics["evaluations"][min(1, len(metrics["evaluations"]) - 1)]["name"]
    title = f"{label(method)} on {card['name']}"
    headline, details = verdict(metrics)
    small = f'<p class="note">{MINIATURE}</p>' if card["source_kind"] == "drawn" else ""
    body = "".join(
        (
            f'<header><p class="eyebrow">{esc(title)}</p><h1>{esc(headline)}</h1>',
            *(f'<p class="lead">{esc(line)}</p>' for line in details),
            f"{small}</header><main>",
            _section("The answer", _answer(metrics)),
            _section("How training went", _training(metrics, logs)),
            _section("Test images", gallery),
            _section("How it was made", stages_table(metrics["stages"])),
            f"</main><footer>{_footer(metrics)}</footer>",
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _answer(metrics: dict[str, Any]) -> str:
    images = metrics["images"]
    counts = " and ".join(
        f"{n:,} images of {images['classes'].get(group, 0)} {group} classes"
        for group, n in images["groups"].items()
    )
    left_out = images["test_images_in_all"] - images["in_split"].get("test", 0)
    note = f" ({left_out:,} test images of the split were not evaluated)" if left_out > 0 else ""
    if set(images["in_split"]) == {"val"}:
        note = " (validation images, for tuning: no result)"
    policies = [(label(e["name"]), i % STYLES) for i, e in enumerate(metrics["evaluations"])]
    return (
        f"<p>Accuracy in % over {counts}{note}. Every policy answers the same images in every "
        "mode, and an answer that cannot be read counts as wrong.</p>"
        f"{_key(policies, dots=True)}"
        f'<div class="charts">{"".join(_accuracy_charts(metrics))}</div>'
        f"{results_table(metrics)}{status_list(metrics)}"
    )


def _accuracy_charts(metrics: dict[str, Any]) -> list[str]:
    """One chart a mode, all on the same axis so that modes compare at a glance."""
    evaluations = metrics["evaluations"]
    keys = (*metrics["images"]["groups"], "harmonic_mean")
    found = [
        e["modes"].get(m, {}).get(k) for e in evaluations for m in metrics["modes"] for k in keys
    ]
    ends = [100 * end for figures in found if figures for end in figures["interval"]]
    limits = axis_of(ends)
    charts = []
    for number, mode in enumerate(metrics["modes"]):
        rows = []
        for key in keys:
            dots = [
                _dot(e["name"], index % STYLES, e["modes"][mode][key])
                for index, e in enumerate(evaluations)
                if key in e["modes"].get(mode, {})
            ]
            rows += [(label(key), dots)] if dots else []
        title = label(mode)[:1].upper() + label(mode)[1:]
        told = "; ".join(
            f"{row}: {', '.join(f'{d.name} {d.value:.1f} %' for d in dots)}" for row, dots in rows
        )
        chart = dot_chart(f"accuracy-{number}", title, told, rows, limits)
        charts.append(_figure(title, MODE_NOTES.get(mode, ""), chart))
    return charts


def _dot(name: str, style: int, figures: dict[str, Any]) -> Dot:
    low, high = figures["interval"]
    value = figures["accuracy"]
    return Dot(label(name), 100 * value, 100 * low, 100 * high, style)


def _training(metrics: dict[str, Any], logs: Sequence[list[dict]]) -> str:
    charts = [*_pass_charts(metrics["evaluations"]), *_log_charts(logs, metrics["rounds"])]
    shown = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return shown + refresh_table(metrics["rounds"])


def _pass_charts(evaluations: Sequence[dict]) -> list[str]:
    charts = []
    for group in ("base", "novel"):
        curves = [(e["name"], e["pass_at_k"].get(group) or []) for e in evaluations]
        series = [
            Series(label(name), [(k, 100 * share) for k, share in enumerate(curve, 1)], i % STYLES)
            for i, (name, curve) in enumerate(curves)
            if curve
        ]
        if not series:
            continue
        title, last = f"Pass@k, {group} classes", max(len(curve) for _, curve in curves)
        told = "; ".join(
            f"{label(name)}: {100 * curve[0]:.1f} % at 1, {100 * curve[-1]:.1f} % at {len(curve)}"
            for name, curve in curves
            if curve
        )
        steps = sorted({1, *(round(last * quarter / 4) for quarter in range(1, 5))} - {0})
        chart = line_chart(
            f"pass-{group}",
            title,
            told,
            series,
            x_label="k",
            x_ticks=steps,
            unit=" %",
            y_range=axis_of([100 * share for _, curve in curves for share in curve]),
        )
        note = "images answered right within k samples"
        charts.append(_figure(title, note, chart, series))
    return charts


def _log_charts(logs: Sequence[list[dict]], rounds: Sequence[dict]) -> list[str]:
    """The training log over all rounds, one after the other, with a rule where each begins."""
    parts: list[list[dict[str, Any]]] = []
    marks: list[tuple[float, str]] = []
    for entry, log in ((entry, log) for entry, log in zip(rounds, logs, strict=True) if log):
        # A round's trainer counts from one again; a count that goes on is left as it is.
        last = parts[-1][-1]["at"] if parts else 0
        offset = last if log[0]["step"] <= last else 0
        marks.append((offset + log[0]["step"], f"round {entry['round']}"))
        parts.append([row | {"at": offset + row["step"]} for row in log])
    told = f"{sum(map(len, parts))} training steps in {len(parts)} rounds"
    charts = []
    for number, wanted in enumerate(LOG_CHARTS):
        faint, named = [], []
        for style, (column, name) in enumerate(wanted.columns, 1):
            lines: list[list[Point]] = [
                [(row["at"], _scaled(row.get(column), wanted.factor)) for row in part]
                for part in parts
            ]
            if sum(map(len, lines)) > 8:
                faint.append(Series("", _joined(lines), style, faint=True))
            # Smoothed within each round: what one round ends with is not where the next begins.
            smoothed = [smooth(line, len(line) // 6) for line in lines]
            named.append(Series(name, _joined(smoothed), style))
        chart = line_chart(
            f"log-{number}",
            wanted.title,
            f"{wanted.note}; {told}",
            faint + named,
            x_label="training step",
            marks=marks if len(marks) > 1 else (),
            unit=wanted.unit,
        )
        if chart:
            key = named if len(named) > 1 else ()
            charts.append(_figure(wanted.title, wanted.note, chart, key))
    return charts


def _joined(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The lines as one, broken where a round ends."""
    points: list[Point] = []
    for line in lines:
        points += [*thin(line, 400 // len(lines) + 1), (line[-1][0], None)]
    return points[:-1]


def axis_of(percents: Sequence[float]) -> tuple[float, float]:
    """The axis from the last multiple of ten below to the first above."""
    low, high = 10.0 * math.floor(min(percents) / 10), 10.0 * math.ceil(max(percents) / 10)
    return low, max(high, low + 10)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * factor


def _figure(title: str, note: str, chart: str, series: Sequence[Series] = ()) -> str:
    key = _key([(s.name, s.style) for s in series], dots=False) if series else ""
    caption = f"<figcaption><b>{esc(title)}</b><span>{esc(note)}</span>{key}</figcaption>"
    return f"<figure>{caption}{chart}</figure>"


def _key(entries: Sequence[tuple[str, int]], *, dots: bool) -> str:
    """What each line style and colour stands for."""
    dot = '<circle class="dot" cx="15" cy="5" r="3.6"/>' if dots else ""
    whisker = " whisker" if dots else ""
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><g class="s{style}">'
        f'<path class="s{style} line{whisker}" d="M1 5H29"/>{dot}</g></svg>{esc(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="key">{items}</ul>'


def _footer(metrics: dict[str, Any]) -> str:
    card, duplicates = metrics["card"], metrics["images"].get("duplicates", {})
    told = (
        f"Images: data card {card['name']}, version {card['version']}, licence {card['license']}."
    )
    if not card["redistribute"]:
        told += " They may not be passed on, so keep this page to yourself."
    for pair, count in duplicates.items():
        told += f" {count:,} images: {pair} (duplicates.parquet of Split)."
    return esc(told)
