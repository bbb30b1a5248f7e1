"""Draws small charts as inline SVG, without scripts: line charts, and dots with intervals.

A chart is 350 units wide, the width of a phone, and a page lays several side by side, so that text
keeps its size on a phone and on a desk. Colours, fonts and line styles come from the page's style
sheet by class (`s0`, `s1`, ...: one for each policy or quantity), so that light and dark themes share
one drawing. Series also differ in dash and marker, never in colour alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from tasks.pages import render

WIDTH = 350
RIGHT = 14
Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line: its name, its points by ascending x (a y of None breaks the line), its style number."""

    name: str
    points: Sequence[Point]
    style: int = 1
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """One estimate with its interval, in the unit of the axis."""

    name: str
    value: float
    low: float
    high: float
    style: int = 1


@dataclass(frozen=True)
class Scale:
    """Maps values from `low..high` to chart units from `start..end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Curve:
    """A line through points, as an SVG path."""

    kind: ClassVar[str] = "path"
    style: str
    d: str


@dataclass(frozen=True)
class Circle:
    """A filled point."""

    kind: ClassVar[str] = "circle"
    style: str
    x: str
    y: str
    r: str


@dataclass(frozen=True)
class Text:
    """A text at a position."""

    kind: ClassVar[str] = "text"
    style: str
    x: str
    y: str
    text: str


@dataclass(frozen=True)
class Group:
    """Marks that belong together, with a title that the pointer shows."""

    kind: ClassVar[str] = "group"
    style: str
    title: str
    parts: tuple[Curve | Circle | Text, ...]


Mark = Curve | Circle | Text | Group


def line_chart(
    key: str,
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_ticks: Sequence[float] | None = None,
    unit: str = "",
) -> Markup:
    """Lines over a common x axis; `marks` are vertical rules with a word at the top.

    `y_range` fixes the axis; without it the axis fits the data. Returns "" when there are no points.
    """
    points = [(x, y) for s in series for x, y in s.points if y is not None and math.isfinite(y)]
    if not points:
        return Markup()
    xs = [x for x, _ in points]
    low, high = y_range or _padded([y for _, y in points])
    height, left, top, bottom = 214, 44, 18 if marks else 10, 176
    y_ticks = ticks(low, high, 4)
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, left, WIDTH - RIGHT)
    y = Scale(min(low, y_ticks[0]), max(high, y_ticks[-1]), bottom, top)
    drawn: list[Mark] = []
    for tick in y_ticks:
        drawn.append(_rule(left, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        drawn.append(_text(left - 7, y(tick) + 4, f"{number(tick)}{unit}", "tick end"))
    shown = x_ticks or [tick for tick in ticks(x.low, x.high, 5) if x.low <= tick <= x.high]
    for tick in shown:
        drawn.append(_text(x(tick), bottom + 17, number(tick), "tick mid"))
    drawn.append(_text((left + WIDTH - RIGHT) / 2, height - 5, x_label, "axis mid"))
    for value, word in marks:
        at = x(min(max(value, x.low), x.high))  # a mark outside the axis stands at its end
        drawn.append(_rule(at, top, at, bottom, "mark"))
        near_end = at > WIDTH - 70
        drawn.append(_text(at + (-4 if near_end else 4), top - 6, word, f"tick{' end' * near_end}"))
    for line in series:
        drawn += _line(line, x, y)
    return _chart(key, title, description, height, drawn)


def dot_chart(
    key: str,
    title: str,
    description: str,
    rows: Sequence[tuple[str, Sequence[Dot]]],
    limits: tuple[float, float],
    *,
    unit: str = "",
    zero: bool = False,
    left: float = 70,
) -> Markup:
    """Dots with intervals: one band for each row, one line in it for each dot.

    `zero` draws a rule at 0. `left` is the width for the rows' names, which wrap at their first
    space.
    """
    top, step, gap = 8, 19, 17
    bottom = top + sum(step * len(dots) + gap for _, dots in rows)
    height = bottom + 26
    x = Scale(*limits, left, WIDTH - RIGHT - 30)
    drawn: list[Mark] = []
    for tick in ticks(*limits, 6):
        if limits[0] <= tick <= limits[1]:
            drawn.append(_rule(x(tick), top, x(tick), bottom, "grid"))
            drawn.append(_text(x(tick), bottom + 17, f"{number(tick)}{unit}", "tick mid"))
    if zero:
        drawn.append(_rule(x(0), top, x(0), bottom, "mark"))
    y = float(top)
    for name, dots in rows:
        middle = y + gap / 2 + step * len(dots) / 2
        words = name.split(" ", 1)
        for index, word in enumerate(words):
            offset = 4 + (index - (len(words) - 1) / 2) * 14
            drawn.append(_text(left - 10, middle + offset, word, "row end"))
        for index, dot in enumerate(dots):
            drawn.append(_dot(dot, name, x, y + gap / 2 + step * (index + 0.5), unit, zero))
        y += step * len(dots) + gap
    return _chart(key, title, description, height, drawn)


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """A centred running mean over `window` points; over fewer at the ends."""
    result: list[Point] = []
    for index, (x, _) in enumerate(points):
        start = max(0, index - window // 2)
        near = [v for _, v in points[start : index + window // 2 + 1] if v is not None]
        result.append((x, sum(near) / len(near) if near else None))
    return result


def thin(points: Sequence[Point], limit: int = 400) -> list[Point]:
    """At most about `limit` points, means of equal runs, so that a long training keeps a page small."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return list(points)
    result: list[Point] = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        values = [y for _, y in run if y is not None]
        result.append((run[len(run) // 2][0], sum(values) / len(values) if values else None))
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from the last one at or below `low` to the first one at or above `high`."""
    span = high - low if high > low else 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if span / (m * power) <= count + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))  # so that 3 * 0.1 gives 0.3, at any magnitude
    return [float(round(index * step, digits)) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's text: short, with thousands grouped and a real minus sign."""
    text = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return text.replace("-", "−")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    # The axis of a quantity that is never negative (a length, a share) begins at zero.
    return (0.0, high or 1.0) if low >= 0 else (low, max(high, 0.0))


def _chart(key: str, title: str, description: str, height: float, marks: list[Mark]) -> Markup:
    return render(
        "chart.svg.jinja",
        key=key,
        title=title,
        description=description,
        width=WIDTH,
        height=f"{height:g}",
        marks=marks,
    )


def _line(series: Series, x: Scale, y: Scale) -> Iterator[Mark]:
    pieces: list[list[str]] = [[]]
    for px, py in series.points:
        if py is None or not math.isfinite(py):
            pieces.append([])
        else:
            pieces[-1].append(f"{x(px):.1f} {y(py):.1f}")
    style = f"s{series.style} line{' faint' * series.faint}"
    path = "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1)
    if path:
        yield Curve(style, path)
    for piece in pieces:
        if len(piece) == 1:  # a line through one point is invisible
            cx, cy = piece[0].split()
            yield Circle(f"s{series.style} dot", cx, cy, r="3")


def _dot(dot: Dot, row: str, x: Scale, y: float, unit: str, signed: bool) -> Group:
    shown = f"{dot.value:+.1f}" if signed else f"{dot.value:.1f}"
    title = (
        f"{row}, {dot.name}: {dot.value:.1f}{unit} (95 % interval {dot.low:.1f} to {dot.high:.1f})"
    )
    low, high = x(max(dot.low, x.low)), x(min(dot.high, x.high))
    return Group(
        f"s{dot.style}",
        title,
        (
            Curve("line whisker", f"M{low:.1f} {y:.1f}H{high:.1f}"),
            Circle("dot", f"{x(dot.value):.1f}", f"{y:.1f}", r="4.5"),
            _text(high + 6, y + 4, shown.replace("-", "−"), "value"),
        ),
    )


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> Curve:
    return Curve(style, f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}")


def _text(x: float, y: float, text: str, style: str) -> Text:
    return Text(style, f"{x:.1f}", f"{y:.1f}", text)
