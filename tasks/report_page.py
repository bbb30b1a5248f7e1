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
    "two_step": "sampled answers first, then a choice among them",
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
        "groups whose completions all earn the same, and so teach nothing",
        (("dead_group_share", "share"),),
        100,
        " %",
    ),
    LogChart("KL divergence", "from the policy that the round began with", (("kl", "KL"),)),
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
            f"</main><footer>{_footer(card)}</footer>",
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
    return (
        f"<p>Accuracy in % over {counts}{note}. Every policy answers the same images in every "
        "mode, and an answer that cannot be read counts as wrong.</p>"
        f"{_key([(label(e['name']), i % STYLES) for i, e in enumerate(metrics['evaluations'])])}"
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
    limits = (10.0 * math.floor(min(ends) / 10), 10.0 * math.ceil(max(ends) / 10))
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
        series = []
        for index, evaluation in enumerate(evaluations):
            curve = evaluation["pass_at_k"].get(group) or []
            line: list[Point] = [(k, 100 * share) for k, share in enumerate(curve, 1)]
            series += [Series(label(evaluation["name"]), line, index % STYLES)] if line else []
        if not series:
            continue
        title, last = f"Pass@k, {group} classes", max(len(s.points) for s in series)
        told = "; ".join(
            f"{s.name} {s.points[0][1]:.0f} to {s.points[-1][1]:.0f} %" for s in series
        )
        steps = sorted({1, *(round(last * quarter / 4) for quarter in range(1, 5))} - {0})
        chart = line_chart(
            f"pass-{group}", title, told, series, x_label="k", x_ticks=steps, unit=" %"
        )
        note = "test images with a right answer among k samples"
        charts.append(_figure(title, note, chart, series))
    return charts


def _log_charts(logs: Sequence[list[dict]], rounds: Sequence[dict]) -> list[str]:
    """The training log over all rounds, one after the other, with a rule where each begins."""
    rows: list[dict[str, Any]] = []
    marks: list[tuple[float, str]] = []
    for entry, log in zip(rounds, logs, strict=True):
        # A round's trainer counts from one again; a resumed count goes on as it is.
        offset = rows[-1]["at"] if rows and log and log[0]["step"] <= rows[-1]["at"] else 0
        marks += [(offset + log[0]["step"], f"round {entry['round']}")] if log else []
        rows += [row | {"at": offset + row["step"]} for row in log]
    charts = []
    for number, wanted in enumerate(LOG_CHARTS):
        series, named = [], []
        for style, (column, name) in enumerate(wanted.columns, 1):
            line: list[Point] = [(r["at"], _scaled(r.get(column), wanted.factor)) for r in rows]
            if len(line) > 8:
                series.append(Series("", thin(line), style, faint=True))
            named.append(Series(name, thin(smooth(line, len(line) // 10)), style))
        told = f"{wanted.note}; {len(rows)} training steps in {len(marks)} rounds"
        chart = line_chart(
            f"log-{number}",
            wanted.title,
            told,
            series + named,
            x_label="training step",
            marks=marks if len(marks) > 1 else (),
            unit=wanted.unit,
        )
        if chart:
            key = named if len(named) > 1 else ()
            charts.append(_figure(wanted.title, wanted.note, chart, key))
    return charts


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * factor


def _figure(title: str, note: str, chart: str, series: Sequence[Series] = ()) -> str:
    key = _key([(s.name, s.style) for s in series]) if series else ""
    caption = f"<figcaption><b>{esc(title)}</b><span>{esc(note)}</span>{key}</figcaption>"
    return f"<figure>{caption}{chart}</figure>"


def _key(entries: Sequence[tuple[str, int]]) -> str:
    """What each line style and colour stands for."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><g class="s{style}">'
        f'<path class="s{style} line" d="M1 5H29"/><circle class="dot" cx="15" cy="5" r="3.6"/></g>'
        f"</svg>{esc(name)}</li>"
        for name, style in entries
    )
    return f'<ul class="key">{items}</ul>'


def _footer(card: dict[str, Any]) -> str:
    told = (
        f"Images: data card {card['name']}, version {card['version']}, licence {card['license']}."
    )
    if not card["redistribute"]:
        told += " They may not be passed on, so keep this page to yourself."
    return esc(told)
