"""A figure of the report, and how it is written as SVG and PNG files, with its data as CSV.

Each figure is drawn once (`tasks/pages/charts.py`). On the page it takes its colours from the style
sheet, and so follows the theme. In a file of its own it has the light theme's colours. The PNG is
rendered from that SVG by resvg, which needs neither a browser nor a graphics library.
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tasks.pages import render, source
from tasks.pages.style import standalone_style

FOLDER = "figures"
ZOOM = 2.5  # pixels a unit: 875 pixels wide, sharp in a paper's column
_KEY_WIDTH = 6.8  # width of a legend's letter, in units, at most
_ROW = 16  # height of a heading's line, in units


@dataclass(frozen=True)
class Figure:
    """One figure: `chart` is an SVG element, `rows` are its data, `legend` pairs names with styles."""

    key: str
    title: str
    note: str
    chart: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    legend: Sequence[tuple[str, int]] = ()
    dots: bool = False


def write(figures: Iterable[Figure], output: Path) -> None:
    """Write `figures/KEY.svg`, `.png` and `.csv` below `output`."""
    import resvg_py

    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        font = _font(Path(scratch))
        for figure in figures:
            drawn = standalone(figure)
            (folder / f"{figure.key}.svg").write_text(drawn, encoding="utf-8")
            picture = resvg_py.svg_to_bytes(
                # The bundled typeface has the plain hyphen only.
                svg_string=drawn.translate({0x2212: "-", 0x2013: "-"}),
                zoom=ZOOM,
                background="#ffffff",
                font_files=[str(font)],
                sans_serif_family="Aileron",
            )
            (folder / f"{figure.key}.png").write_bytes(bytes(picture))
            (folder / f"{figure.key}.csv").write_text(_csv(figure), encoding="utf-8")


def standalone(figure: Figure) -> str:
    """The figure as an SVG file with title, note, legend and the light theme's colours."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure.chart)
    assert size, "a chart names its size"
    width, height = float(size[1]), float(size[2])
    y = 20.0
    note = []
    for line in _wrapped(figure.note, int(width / 6.3)):
        y += _ROW
        note.append((f"{y:g}", line))
    legend = []
    if len(figure.legend) > 1:
        x, y = 2.0, y + _ROW + 2
        for name, style in figure.legend:
            wide = 46 + _KEY_WIDTH * len(name)
            if x > 2 and x + wide > width:
                x, y = 2.0, y + _ROW
            position = {"x": x, "top": y - 9, "text_x": x + 34, "y": y}
            texts = {key: f"{value:g}" for key, value in position.items()}
            legend.append({"name": name, "style": style, **texts})
            x += wide
    top = y + 10
    inner = re.sub(r' (role|aria-labelledby)="[^"]*"', "", str(figure.chart))
    inner = inner.replace(
        "<svg ", f'<svg x="0" y="{top:g}" width="{width:g}" height="{height:g}" ', 1
    )
    return render(
        "standalone.svg.jinja",
        figure=figure,
        width=f"{width:g}",
        height=f"{top + height + 4:g}",
        style=Markup(standalone_style(source("charts.css"))),
        note=note,
        legend=legend,
        chart=Markup(inner),  # markup of a template, with another first tag
    )


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if text else []


def _font(folder: Path) -> Path:
    """The typeface bundled with Pillow, as a file, so that machines without fonts draw text as well."""
    from PIL import ImageFont

    path = folder / "aileron.ttf"
    path.write_bytes(ImageFont.load_default(size=12).font_bytes)  # type: ignore[union-attr]
    return path


def _csv(figure: Figure) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows(figure.rows)
    return buffer.getvalue()
