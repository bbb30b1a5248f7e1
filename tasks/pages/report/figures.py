"""The report's figures, drawn from the contents of `metrics.json`; `training_log.py` draws the logs."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.pages.charts import Dot, Series, dot_chart, line_chart
from tasks.pages.figures import Figure
from tasks.pages.text import label, p_value, title_of

STYLES = 5  # line styles in the style sheet; further policies reuse them
MODE_NOTES = {
    "one_step": "one greedy answer to the open question",
    "two_step": "a choice among its most sampled answers",
    "majority": "the most voted of its sampled answers",
    "mcq": "a choice among options that hold the truth",
    "constrained": "the same, kept to letters by force",
    "adaptive": "samples and options as an image needs them",
}
GROUP_NOTES = {"base": "classes it was trained on", "novel": "classes it never saw in training"}
FEW = 10  # images; a smaller bin is in the data, but not on the line


def accuracy_figures(metrics: Mapping[str, Any]) -> list[Figure]:
    """Accuracy by group, one chart for each mode; all share one axis, so that modes can be compared."""
    evaluations = metrics["evaluations"]
    keys = (*metrics["images"]["groups"], "harmonic_mean")
    estimates = [
        e["modes"].get(m, {}).get(k) for e in evaluations for m in metrics["modes"] for k in keys
    ]
    limits = axis_of([100 * end for figures in estimates if figures for end in figures["interval"]])
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
        description = "; ".join(
            f"{row}: {', '.join(f'{d.name} {d.value:.1f} %' for d in dots)}" for row, dots in rows
        )
        key = "accuracy-" + re.sub(r"\W+", "-", mode, flags=re.ASCII)
        chart = dot_chart(key, title_of(mode), description, rows, limits)
        columns = ("policy", "mode", "group", "accuracy", "low", "high")
        note = MODE_NOTES.get(mode, "")
        key_of = policies(evaluations)
        figures.append(Figure(key, title_of(mode), note, chart, columns, data, key_of, dots=True))
    return figures


def pass_figures(evaluations: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Pass@k of every policy, one chart for each group."""
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
        description = "; ".join(
            f"{label(name)}: {100 * curve[0]:.1f} % at 1, {100 * curve[-1]:.1f} % at {len(curve)}"
            for name, _, curve in curves
        )
        steps = sorted({1, *(round(last * quarter / 4) for quarter in range(1, 5))} - {0})
        title = f"Pass@k, {group} classes"
        chart = line_chart(
            f"pass-{group}",
            title,
            description,
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


def budget_figure(evaluations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Harmonic mean over answers an image, of the strategies whose every answer is known.

    The line of a policy joins its majority votes; its single points are the other strategies.
    """
    series, data, ends = [], [], []
    for index, evaluation in enumerate(evaluations):
        line, style = [], index % STYLES
        for point in evaluation["budget_curve"]:
            if "interval" not in point.get("harmonic_mean", {}):
                continue
            mean, interval = point["harmonic_mean"]["low"], point["harmonic_mean"]["interval"]
            name = point["strategy"]
            data.append((evaluation["name"], name, point["answers"], mean, *interval))
            ends.append(100 * mean)
            if name.startswith("majority"):
                line.append((point["answers"], 100 * mean))
            else:
                series.append(Series(name, [(point["answers"], 100 * mean)], style))
        if line:
            series.append(Series(label(evaluation["name"]), line, style))
    if not data:
        return None
    title = "Accuracy by answers an image"
    chart = line_chart(
        "budget",
        title,
        "; ".join(f"{label(row[0])}, {row[1]}: {100 * row[3]:.1f} %" for row in data),
        series,
        x_label="answers an image",
        unit=" %",
        y_range=axis_of(ends),
    )
    note = "harmonic mean; the line is the majority of so many samples, the points the other strategies"
    columns = ("policy", "strategy", "answers", "harmonic_mean", "low", "high")
    return Figure("budget", title, note, chart, columns, data, policies(evaluations))


def letter_figure(evaluations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Letter bias: how much more often each letter is chosen than a policy without bias would."""
    with_letters = [(i, e) for i, e in enumerate(evaluations) if e.get("letters")]
    if not with_letters:
        return None
    names = sorted({letter for _, e in with_letters for letter in e["letters"]["letters"]})
    rows, data = [], []
    for letter in names:
        dots = []
        for index, evaluation in with_letters:
            if figures := evaluation["letters"]["letters"].get(letter):
                low, high = figures["interval"]
                name = label(evaluation["name"])
                bias = figures["bias"]
                dots.append(Dot(name, 100 * bias, 100 * low, 100 * high, index % STYLES))
                shares = (figures["chosen"], figures["expected"], figures["right"])
                data.append((evaluation["name"], letter, *shares, bias, low, high))
        rows.append((letter, dots))
    ends = [end for _, dots in rows for dot in dots for end in (dot.low, dot.high)]
    description = "; ".join(
        f"{row}: {', '.join(f'{d.name} {d.value:+.1f}' for d in dots)}" for row, dots in rows
    )
    limits = axis_of([*ends, -5, 5], step=5)
    chart = dot_chart("letters", "Letter bias", description, rows, limits, zero=True, left=34)
    tests = "; ".join(
        f"{label(e['name'])}: {e['letters']['questions']:,} questions ({label(e['letters']['mode'])}), "
        f"chi-square p {p_value(e['letters']['p'])}"
        for _, e in with_letters
    )
    note = f"share chosen less the share expected by chance, in points; {tests}"
    columns = ("policy", "letter", "chosen", "expected", "right", "bias", "low", "high")
    legend = [(label(e["name"]), index % STYLES) for index, e in with_letters]
    return Figure("letters", "Letter bias", note, chart, columns, data, legend, dots=True)


def calibration_figure(evaluations: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Calibration: the majority's accuracy by its share of the votes, beside the diagonal."""
    calibrated = [(i, e) for i, e in enumerate(evaluations) if e.get("calibration")]
    if not calibrated:
        return None
    series = [Series("", [(0, 0.0), (100, 100.0)], 0, faint=True)]
    data, descriptions, legend = [], [], []
    for index, evaluation in calibrated:
        bins = evaluation["calibration"]["bins"]
        points = [(100 * b["vote_share"], 100 * b["accuracy"]) for b in bins if b["images"] >= FEW]
        name = f"{label(evaluation['name'])}, error {100 * evaluation['calibration']['error']:.1f}"
        series.append(Series(name, points, index % STYLES))
        legend.append((name, index % STYLES))
        descriptions.append(f"{name} points")
        data += [
            (evaluation["name"], b["vote_share"], b["accuracy"], *b["interval"], b["images"])
            for b in bins
        ]
    title = "Do the votes know?"
    chart = line_chart(
        "calibration",
        title,
        "; ".join(descriptions),
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
    """Training images by how many of their rollouts name the truth, one line for each round."""
    counted = [entry for entry in rounds if entry["refresh"].get("truth_votes")]
    if not counted:
        return None
    series, data = [], []
    for index, entry in enumerate(counted):
        counts = entry["refresh"]["truth_votes"]
        total = sum(counts) or 1
        # The share of images with at most n such rollouts: lower where the policy knows more.
        shares = [100 * sum(counts[: n + 1]) / total for n in range(len(counts))]
        style = index % STYLES
        series.append(Series(f"round {entry['round']}", list(enumerate(shares)), style))
        data += [(entry["round"], n, count) for n, count in enumerate(counts)]
    title = "What it knows before each round"
    description = "; ".join(
        f"{s.name}: {s.points[0][1]:.0f} % of images never named right" for s in series
    )
    last = len(counted[0]["refresh"]["truth_votes"]) - 1
    chart = line_chart(
        "truth-votes",
        title,
        description,
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
    """The legend, as (name, style), of every chart whose styles are policies."""
    return [(label(e["name"]), i % STYLES) for i, e in enumerate(evaluations)]


def axis_of(percents: Sequence[float], step: float = 10) -> tuple[float, float]:
    """The limits of an axis: the multiples of `step` just below and just above all values."""
    low, high = step * math.floor(min(percents) / step), step * math.ceil(max(percents) / step)
    return low, max(high, low + step)
