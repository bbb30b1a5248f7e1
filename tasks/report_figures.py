"""Every figure of the report, from `metrics.json`'s contents and the training logs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.charts import Dot, Point, Series, dot_chart, line_chart, smooth, thin
from tasks.figures import Figure
from tasks.report_text import label

STYLES = 5  # line styles in the style sheet; more policies than that start over
MODE_NOTES = {
    "one_step": "one greedy answer to the open question",
    "two_step": "a choice among its most sampled answers",
    "majority": "the most voted of its sampled answers",
    "mcq": "a choice among options that hold the truth",
    "constrained": "the same, kept to letters by force",
}
GROUP_NOTES = {"base": "classes it was trained on", "novel": "classes it never saw in training"}


@dataclass(frozen=True)
class LogChart:
    """One chart of the training log: its columns with their names, and how to scale them."""

    title: str
    note: str
    columns: tuple[tuple[str, str], ...]
    factor: float = 1
    unit: str = ""


REWARD_NAMES = {"letter_reward": "right letter", "format_reward": "right format"}
# What a reader looks for first; columns that are not in the log are not drawn.
LOG_CHARTS = (
    LogChart(
        "Validation accuracy",
        "open question, greedy, a sample of the validation images",
        (("val_accuracy", "right"), ("val_unreadable", "unreadable")),
        100,
        " %",
    ),
    LogChart(
        "Completion length",
        "tokens, mean over a step",
        (("completion_length", "length"),),
    ),
    LogChart(
        "Dead groups",
        "groups in which all earn the same, so that nothing is learned",
        (("dead_group_share", "share"),),
        100,
        " %",
    ),
    LogChart("KL divergence", "from where the round began, nats a token", (("kl", "KL"),)),
    LogChart("Entropy", "of the next token, nats", (("entropy", "entropy"),)),
    LogChart(
        "Spread",
        "standard deviation over a step",
        (("advantage_spread", "advantage"), ("reward_std", "reward")),
    ),
    LogChart(
        "Answers cut off",
        "completions that reached the limit",
        (("clipped_share", "share"),),
        100,
        " %",
    ),
    LogChart(
        "Seconds a step",
        "where the time goes",
        (
            ("seconds_generation", "generation"),
            ("seconds_reward", "reward"),
            ("seconds_update", "update"),
            ("seconds", "whole step"),
        ),
    ),
    LogChart("Speed", "tokens generated a second", (("tokens_per_second", "tokens"),)),
    LogChart("Gradient norm", "before clipping", (("grad_norm", "norm"),)),
    LogChart("Loss", "of the optimiser", (("loss", "loss"),)),
    LogChart("Learning rate", "by step", (("learning_rate", "rate"),)),
)
FEW = 10  # images; a bin of fewer is in the data, but no point of the line
FIRST = ("Reward", "Validation accuracy", "Completion length", "Dead groups", "KL divergence")


def accuracy_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """One chart a mode, all on the same axis so that modes compare at a glance."""
    evaluations = metrics["evaluations"]
    keys = (*metrics["images"]["groups"], "harmonic_mean")
    found = [
        e["modes"].get(m, {}).get(k) for e in evaluations for m in metrics["modes"] for k in keys
    ]
    limits = axis_of([100 * end for figures in found if figures for end in figures["interval"]])
    figures = []
    for mode in metrics["modes"]:
        rows, data = [], []
        for key in keys:
            dots = []
            for index, evaluation in enumerate(evaluations):
                if key in (of_mode := evaluation["modes"].get(mode, {})):
                    low, high = of_mode[key]["interval"]
                    value = of_mode[key]["accuracy"]
                    name = label(evaluation["name"])
                    dots.append(Dot(name, 100 * value, 100 * low, 100 * high, index % STYLES))
                    data.append((evaluation["name"], mode, key, value, low, high))
            rows += [(label(key), dots)] if dots else []
        told = "; ".join(
            f"{row}: {', '.join(f'{d.name} {d.value:.1f} %' for d in dots)}" for row, dots in rows
        )
        key = f"accuracy-{mode}"
        chart = dot_chart(key, title_of(mode), told, rows, limits)
        columns = ("policy", "mode", "group", "accuracy", "low", "high")
        note = MODE_NOTES.get(mode, "")
        key_of = policies(evaluations)
        figures.append(Figure(key, title_of(mode), note, chart, columns, data, key_of, dots=True))
    return figures


def pass_figures(evaluations: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Pass@k of every policy, a chart a group."""
    figures = []
    for group in ("base", "novel"):
        curves = [
            (e["name"], i % STYLES, e["pass_at_k"].get(group) or [])
            for i, e in enumerate(evaluations)
        ]
        curves = [entry for entry in curves if entry[2]]
        if not curves:
            continue
        series = [
            Series(label(name), [(k, 100 * share) for k, share in enumerate(curve, 1)], style)
            for name, style, curve in curves
        ]
        last = max(len(curve) for _, _, curve in curves)
        told = "; ".join(
            f"{label(name)}: {100 * curve[0]:.1f} % at 1, {100 * curve[-1]:.1f} % at {len(curve)}"
            for name, _, curve in curves
        )
        steps = sorted({1, *(round(last * quarter / 4) for quarter in range(1, 5))} - {0})
        title = f"Pass@k, {group} classes"
        chart = line_chart(
            f"pass-{group}",
            title,
            told,
            series,
            x_label="k",
            x_ticks=steps,
            unit=" %",
            y_range=axis_of([100 * share for _, _, curve in curves for share in curve]),
        )
        data = [
            (name, group, k, share) for name, _, curve in curves for k, share in enumerate(curve, 1)
        ]
        note = f"images answered right within k samples; {GROUP_NOTES[group]}"
        columns = ("policy", "group", "k", "pass_at_k")
        key = [(label(name), style) for name, style, _ in curves]
        figures.append(Figure(f"pass-{group}", title, note, chart, columns, data, key))
    return figures


def log_figures(logs: Sequence[list[dict]], rounds: Sequence[dict]) -> list[Figure]:
    """The training log over all rounds, one after the other, with a rule where each begins.

    Columns that no chart is made for are drawn as they are called.
    """
    parts: list[list[dict[str, Any]]] = []
    marks: list[tuple[float, str]] = []
    for entry, log in ((entry, log) for entry, log in zip(rounds, logs, strict=True) if log):
        # A round's trainer counts from one again; a count that goes on is left as it is.
        last = parts[-1][-1]["at"] if parts else 0
        offset = last if log[0]["step"] <= last else 0
        marks.append((offset + log[0]["step"], f"round {entry['round']}"))
        parts.append([row | {"at": offset + row["step"], "round": entry["round"]} for row in log])
    if not parts:
        return []
    figures: list[Figure] = []
    for wanted in (_rewards(parts), *LOG_CHARTS, *_others(parts)):
        key = "log-" + re.sub(r"[^a-z0-9]+", "-", wanted.title.lower()).strip("-")
        figure = _log_figure(key, wanted, parts, marks)
        figures += [figure] if figure and key not in {f.key for f in figures} else []
    return figures


def _rewards(parts: Sequence[list[dict[str, Any]]]) -> LogChart:
    """The parts of the reward, whatever rewards a run had."""
    columns = {name: None for part in parts for row in part for name in row}
    named = {c: c.removeprefix("reward/").replace("_", " ") for c in columns if "reward/" in c}
    if not named:
        named = {c: REWARD_NAMES[c] for c in REWARD_NAMES if c in columns}
    if len(named) > 1 and "reward" in columns:
        named = {"reward": "weighted sum", **named}
    return LogChart("Reward", "and its parts, mean over a step", tuple(named.items()))


def _others(parts: Sequence[list[dict[str, Any]]]) -> list[LogChart]:
    """One chart for every further column of numbers."""
    known = {column for chart in LOG_CHARTS for column, _ in chart.columns}
    known |= {column for column, _ in _rewards(parts).columns} | {*REWARD_NAMES, "reward"}
    known |= {"step", "at", "round", "epoch"}
    rest = {
        name: None
        for part in parts
        for row in part
        for name, value in row.items()
        if name not in known and isinstance(value, int | float)
    }
    return [LogChart(title_of(n.replace("/", ", ")), "as logged", ((n, n),)) for n in sorted(rest)]


def _log_figure(
    key: str,
    wanted: LogChart,
    parts: Sequence[list[dict[str, Any]]],
    marks: Sequence[tuple[float, str]],
) -> Figure | None:
    faint: list[Series] = []
    named: list[Series] = []
    for column, name in wanted.columns:
        lines: list[list[Point]] = [
            [(row["at"], _scaled(row.get(column), wanted.factor)) for row in part] for part in parts
        ]
        if all(y is None for line in lines for _, y in line):
            continue
        style = 1 + len(named) % (STYLES - 1)
        # What is measured at some steps only is drawn through those steps.
        lines = [[p for p in line if p[1] is not None] for line in lines]
        lines = [line for line in lines if line]
        if sum(map(len, lines)) > 8:
            faint.append(Series("", _joined(lines), style, faint=True))
        # Smoothed within each round: what one round ends with is not where the next begins.
        smoothed = [smooth(line, len(line) // 6) for line in lines]
        named.append(Series(name, _joined(smoothed), style))
    told = f"{wanted.note}; {sum(map(len, parts))} training steps in {len(parts)} rounds"
    chart = line_chart(
        key,
        wanted.title,
        told,
        faint + named,
        x_label="training step",
        marks=marks if len(marks) > 1 else (),
        unit=wanted.unit,
    )
    if not chart:
        return None
    drawn = [column for column, _ in wanted.columns]
    rows = [
        (row["round"], row["step"], *(row.get(column) for column in drawn))
        for part in parts
        for row in part
    ]
    legend = [(series.name, series.style) for series in named]
    columns = ("round", "step", *drawn)
    return Figure(key, wanted.title, wanted.note, chart, columns, rows, legend)


def letter_figure(evaluations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """By letter, how much oftener it is chosen than it is right."""
    found = [(i, e) for i, e in enumerate(evaluations) if e.get("letters")]
    if not found:
        return None
    names = sorted({letter for _, e in found for letter in e["letters"]["letters"]})
    rows, data = [], []
    for letter in names:
        dots = []
        for index, evaluation in found:
            if figures := evaluation["letters"]["letters"].get(letter):
                low, high = figures["interval"]
                name = label(evaluation["name"])
                bias = figures["bias"]
                dots.append(Dot(name, 100 * bias, 100 * low, 100 * high, index % STYLES))
                shares = (figures["chosen"], figures["right"])
                data.append((evaluation["name"], letter, *shares, bias, low, high))
        rows.append((letter, dots))
    ends = [end for _, dots in rows for dot in dots for end in (dot.low, dot.high)]
    told = "; ".join(
        f"{row}: {', '.join(f'{d.name} {d.value:+.1f}' for d in dots)}" for row, dots in rows
    )
    limits = axis_of([*ends, -5, 5], step=5)
    chart = dot_chart("letters", "Letter bias", told, rows, limits, zero=True, left=34)
    first = found[0][1]["letters"]
    note = (
        f"share chosen less share right, in points, {first['questions']:,} questions that hold the "
        f"truth ({label(first['mode'])})"
    )
    columns = ("policy", "letter", "chosen", "right", "bias", "low", "high")
    legend = policies(evaluations)
    return Figure("letters", "Letter bias", note, chart, columns, data, legend, dots=True)


def calibration_figure(evaluations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy of the majority by its share of the votes, beside the diagonal."""
    found = [(i, e) for i, e in enumerate(evaluations) if e.get("calibration")]
    if not found:
        return None
    series = [Series("", [(0, 0.0), (100, 100.0)], 0, faint=True)]
    data, told, legend = [], [], []
    for index, evaluation in found:
        bins = evaluation["calibration"]["bins"]
        points = [(100 * b["vote_share"], 100 * b["accuracy"]) for b in bins if b["images"] >= FEW]
        name = f"{label(evaluation['name'])}, error {100 * evaluation['calibration']['error']:.1f}"
        series.append(Series(name, points, index % STYLES))
        legend.append((name, index % STYLES))
        told.append(f"{name} points")
        data += [
            (evaluation["name"], b["vote_share"], b["accuracy"], *b["interval"], b["images"])
            for b in bins
        ]
    title = "Do the votes know?"
    chart = line_chart(
        "calibration",
        title,
        "; ".join(told),
        series,
        x_label="share of the votes, %",
        x_ticks=(0, 25, 50, 75, 100),
        unit=" %",
        y_range=(0, 100),
    )
    note = "accuracy of the most voted answer; on the thin line votes are as sure as they are right"
    columns = ("policy", "vote_share", "accuracy", "low", "high", "images")
    return Figure("calibration", title, note, chart, columns, data, legend)


def votes_figure(rounds: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Training images by how many of their rollouts name the truth, a line a round."""
    found = [entry for entry in rounds if entry["refresh"].get("truth_votes")]
    if not found:
        return None
    series, data = [], []
    for index, entry in enumerate(found):
        counts = entry["refresh"]["truth_votes"]
        total = sum(counts) or 1
        # Images that name it at most n times: a rising line, lower where the policy knows more.
        shares = [100 * sum(counts[: n + 1]) / total for n in range(len(counts))]
        style = index % STYLES
        series.append(Series(f"round {entry['round']}", list(enumerate(shares)), style))
        data += [(entry["round"], n, count) for n, count in enumerate(counts)]
    title = "What it knows before each round"
    told = "; ".join(
        f"{s.name}: {s.points[0][1]:.0f} % of images never named right" for s in series
    )
    last = len(found[0]["refresh"]["truth_votes"]) - 1
    chart = line_chart(
        "truth-votes",
        title,
        told,
        series,
        x_label="rollouts that name the truth, at most",
        x_ticks=sorted({0, *(round(last * q / 4) for q in range(1, 5))}),
        unit=" %",
        y_range=(0, 100),
    )
    note = "share of the training images; a lower line is a policy that knows more"
    legend = [(s.name, s.style) for s in series]
    return Figure(
        "truth-votes", title, note, chart, ("round", "truth_votes", "images"), data, legend
    )


def policies(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The legend of every chart whose styles are policies."""
    return [(label(e["name"]), i % STYLES) for i, e in enumerate(evaluations)]


def axis_of(percents: Sequence[float], step: float = 10) -> tuple[float, float]:
    """The axis from the last multiple of `step` below to the first above."""
    low, high = step * math.floor(min(percents) / step), step * math.ceil(max(percents) / step)
    return low, max(high, low + step)


def title_of(name: str) -> str:
    """A label that begins a line."""
    text = label(name)
    return text[:1].upper() + text[1:]


def _joined(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """The lines as one, broken where a round ends."""
    points: list[Point] = []
    for line in lines:
        points += [*thin(line, 400 // len(lines) + 1), (line[-1][0], None)]
    return points[:-1]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * factor
