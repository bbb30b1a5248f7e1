"""A figure of the report in all its forms: on the page, as SVG and PNG, and its data as CSV.

There is one drawing of each figure (`tasks/charts.py`). On the page it takes its colours from the
style sheet, and so follows the theme; in a file of its own it carries the light theme's. The PNG is
rendered from that very SVG by resvg, which needs no browser and no graphics library.
"""

import csv
import io
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.report_style import standalone_style
from tasks.report_text import esc

FOLDER = "figures"
ZOOM = 2.5  # pixels a unit: 875 across, sharp in a paper's column
_KEY_WIDTH = 6.8  # units a letter of the legend takes, at most
_ROW = 16  # units a line of the head


@dataclass(frozen=True)
class Figure:
    """One figure: `chart` is an SVG element, `legend` names its styles, `rows` are its data."""

    key: str
    title: str
    note: str
    chart: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    legend: Sequence[tuple[str, int]] = ()
    dots: bool = False


def on_page(figure: Figure, *, with_key: bool = True) -> str:
    """The figure as HTML, with its legend and where its files lie."""
    wanted = with_key and len(figure.legend) > 1
    key = legend(figure.legend, dots=figure.dots) if wanted else ""
    links = " ".join(
        f'<a href="{FOLDER}/{figure.key}.{kind}">{kind.upper()}</a>'
        for kind in ("svg", "png", "csv")
    )
    caption = (
        f"<figcaption><b>{esc(figure.title)}</b><span>{esc(figure.note)}</span>{key}</figcaption>"
    )
    return f'<figure>{caption}<div>{figure.chart}<p class="files">{links}</p></div></figure>'


def legend(entries: Sequence[tuple[str, int]], *, dots: bool) -> str:
    """What each line style and colour stands for, as HTML."""
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true">{_sample(style, dots)}</svg>{esc(name)}</li>'
        for name, style in entries
    )
    return f'<ul class="key">{items}</ul>'


def write(figures: Iterable[Figure], output: Path) -> None:
    """Write `figures/KEY.svg`, `.png` and `.csv` below `output`."""
    import resvg_py

    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        font = _font(Path(place))
        for figure in figures:
            drawn = standalone(figure)
            (folder / f"{figure.key}.svg").write_text(drawn, encoding="utf-8")
            picture = resvg_py.svg_to_bytes(
                # The typeface for machines without fonts has the plain hyphen only.
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
    head = [f'<text class="head" x="2" y="{y:g}">{esc(figure.title)}</text>']
    for line in _wrapped(figure.note, int(width / 6.3)):
        y += _ROW
        head.append(f'<text x="2" y="{y:g}">{esc(line)}</text>')
    if len(figure.legend) > 1:
        x, y = 2.0, y + _ROW + 2
        for name, style in figure.legend:
            wide = 46 + _KEY_WIDTH * len(name)
            if x > 2 and x + wide > width:
                x, y = 2.0, y + _ROW
            sample = f'<g transform="translate({x:g} {y - 9:g})">{_sample(style, figure.dots)}</g>'
            head.append(f'{sample}<text x="{x + 34:g}" y="{y:g}">{esc(name)}</text>')
            x += wide
    top = y + 10
    inner = re.sub(r' (role|aria-labelledby)="[^"]*"', "", figure.chart)
    inner = inner.replace(
        "<svg ", f'<svg x="0" y="{top:g}" width="{width:g}" height="{height:g}" ', 1
    )
    whole = top + height + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {whole:g}" '
        f'width="{width:g}" height="{whole:g}"><style>{standalone_style()}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(head)}{inner}</svg>\n'
    )


def _sample(style: int, dots: bool) -> str:
    dot = '<circle class="dot" cx="15" cy="5" r="3.6"/>' if dots else ""
    whisker = " whisker" if dots else ""
    return f'<g class="s{style}"><path class="s{style} line{whisker}" d="M1 5H29"/>{dot}</g>'


def _wrapped(text: str, letters: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if text else []


def _font(folder: Path) -> Path:
    """The typeface that Pillow carries, as a file: text is drawn on machines without fonts, too."""
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
