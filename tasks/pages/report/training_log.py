"""Draws the training log: every column as a figure, over all rounds one after the other."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.pages.charts import Point, Series, line_chart, smooth, thin
from tasks.pages.figures import Figure
from tasks.pages.report.figures import STYLES
from tasks.pages.text import title_of


@dataclass(frozen=True)
class LogChart:
    """One chart of the training log: its columns with their names, and how to scale them."""

    title: str
    note: str
    columns: tuple[tuple[str, str], ...]
    factor: float = 1
    unit: str = ""


# Charts in the order of interest. Columns that the log does not have are not drawn.
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
    LogChart("KL divergence", "from the base policy, nats a token", (("kl", "KL"),)),
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
FIRST = ("Reward", "Validation accuracy", "Completion length", "Dead groups", "KL divergence")


def log_figures(logs: Sequence[list[dict]], rounds: Sequence[dict]) -> list[Figure]:
    """The training log over all rounds, one after the other, with a vertical rule at each start.

    A column without a chart in LOG_CHARTS gets a chart of its own under the column's name.
    """
    parts: list[list[dict[str, Any]]] = []
    marks: list[tuple[float, str]] = []
    for entry, log in ((entry, log) for entry, log in zip(rounds, logs, strict=True) if log):
        # A new round's steps may count from 1 again; then they are shifted behind the last round's.
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
    """The chart of the reward and its parts, whatever rewards a run had."""
    columns = {name: None for part in parts for row in part for name in row}
    named = {c: c.removeprefix("reward/").replace("_", " ") for c in columns if "reward/" in c}
    if len(named) > 1 and "reward" in columns:
        named = {"reward": "weighted sum", **named}
    return LogChart("Reward", "and its parts, mean over a step", tuple(named.items()))


def _others(parts: Sequence[list[dict[str, Any]]]) -> list[LogChart]:
    """One chart for every numeric column that no other chart shows."""
    known = {column for chart in LOG_CHARTS for column, _ in chart.columns}
    known |= {column for column, _ in _rewards(parts).columns} | {"reward"}
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
        # A quantity that is measured at some steps only gets a line through those steps.
        lines = [[p for p in line if p[1] is not None] for line in lines]
        lines = [line for line in lines if line]
        if sum(map(len, lines)) > 8:
            faint.append(Series("", _joined(lines), style, faint=True))
        # Smoothed within each round, because a value may jump between rounds.
        smoothed = [smooth(line, len(line) // 6) for line in lines]
        named.append(Series(name, _joined(smoothed), style))
    description = f"{wanted.note}; {sum(map(len, parts))} training steps in {len(parts)} rounds"
    chart = line_chart(
        key,
        wanted.title,
        description,
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


def _joined(lines: Sequence[Sequence[Point]]) -> list[Point]:
    """All rounds' lines as one list of points, broken where a round ends."""
    points: list[Point] = []
    for line in lines:
        points += [*thin(line, 400 // len(lines) + 1), (line[-1][0], None)]
    return points[:-1]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None or not math.isfinite(value) else value * factor
