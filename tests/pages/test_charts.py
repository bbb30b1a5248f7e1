"""Charts show what they are given, and no text breaks out of them."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.pages.charts import Dot, Series, dot_chart, line_chart, smooth, thin, ticks
from tasks.pages.style import DARK, LIGHT
from tasks.pages.text import esc

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_enclose_the_data_evenly_and_are_few(low, span, count):
    found = ticks(low, low + span, count)
    assert found[0] <= low + 1e-6 * span
    assert found[-1] >= low + span - 1e-6 * span
    assert 2 <= len(found) <= count + 2
    steps = {round((b - a) / span, 6) for a, b in pairwise(found)}
    assert max(steps) - min(steps) <= 1e-5


@given(st.lists(numbers, min_size=1, max_size=2000))
def test_thinning_and_smoothing_invent_no_values(values):
    points = list(enumerate(values))
    assert len(thin(points)) <= 400
    assert len(smooth(points, 9)) == len(points)
    for line in (thin(points), smooth(points, 9)):
        low, high = min(values) - 1e-6, max(values) + 1e-6
        assert all(low <= y <= high for _, y in line)


@given(st.text())
def test_any_text_is_escaped_and_survives_utf_8(text):
    safe = esc(text)
    assert not set(safe) & set("<>\"'")
    # What is left parses as XML and holds no control character and no lone surrogate.
    ElementTree.fromstring(f"<p>{safe}</p>")
    safe.encode("utf-8")


@given(st.lists(st.one_of(st.none(), st.floats(width=32)), max_size=30), st.text())
def test_a_line_chart_is_well_formed_for_any_values_and_names(values, name):
    chart = line_chart("k", name, name, [Series(name, list(enumerate(values)))], x_label=name)
    if not chart:
        assert not any(v is not None and math.isfinite(v) for v in values)
        return
    ElementTree.fromstring(chart)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r">[^<]*<", "><", chart))


def test_a_chart_of_nothing_is_empty():
    assert line_chart("k", "t", "d", [Series("s", [(1, None)])], x_label="x") == ""


def test_a_gap_breaks_the_line_and_a_lone_point_is_a_dot():
    line = Series("s", [(1, 1.0), (2, 2.0), (3, None), (4, 4.0)])
    chart = line_chart("k", "t", "d", [line], x_label="x")
    path = re.search(r'class="s1 line" d="([^"]+)"', chart)
    assert path
    assert path[1].count("M") == 1
    assert chart.count("<circle") == 1


def test_dots_stand_in_the_order_of_their_values():
    rows = [("base", [Dot("a", 40, 30, 50), Dot("b", 60, 55, 65)])]
    chart = dot_chart("k", "t", "d", rows, (20, 80))
    first, second = (float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', chart))
    assert first < second
    assert "base, b: 60.0 (95 % interval 55.0 to 65.0)" in chart


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_every_text_colour_can_be_read(colours):
    for name in ("ink", "muted", "s0", "s1", "s2", "s3", "s4"):
        for ground in ("ground", "raised"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
