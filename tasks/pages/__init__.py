"""Renders the HTML pages and SVG charts from the Jinja2 templates in this folder.

Python computes the values and a template holds the markup. Every value that a template prints is
escaped, because a model or a file may have written anything. Every page fills a block of
`frame.html.jinja`, which carries the content security policy.

A template's line breaks and indentation are for its reader: beside a tag or a block they are
removed, between words they become one space.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from markupsafe import Markup

from tasks.pages import style
from tasks.pages.text import esc, label, percent, points, signs, title_of

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> Markup:
    """Render a template of this folder with `values`, to HTML or SVG.

    Raises jinja2.UndefinedError for a value that the template needs and `values` lacks.
    """
    return Markup(_environment().get_template(template).render(values))


def source(name: str) -> str:
    """The text of a file in this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        finalize=_printed,
        undefined=StrictUndefined,
        loader=FileSystemLoader(FOLDER),
        extensions=[_Lines],
        keep_trailing_newline=True,
        auto_reload=False,
    )
    environment.filters |= {
        "label": label,
        "title_of": title_of,
        "percent": percent,
        "points": points,
        "signs": signs,
        "count": "{:,}".format,
    }
    environment.globals |= {
        "policy": Markup(style.POLICY),
        "light": style.LIGHT,
        "dark": style.DARK,
    }
    return environment


def _printed(value: Any) -> Markup:
    """A value as a template prints it: escaped, unless it is markup from another template."""
    return value if isinstance(value, Markup) else Markup(esc(value))


class _Lines(Extension):
    """Removes a template's line breaks and indentation, but not those of style sheets and scripts."""

    def filter_stream(self, stream: TokenStream) -> Iterable[Token]:
        tokens = list(stream)
        keep = (stream.name or "").endswith((".css", ".js"))
        for index, token in enumerate(tokens):
            if token.type == "data" and not keep:
                before = tokens[index - 1].type if index else ""
                after = tokens[index + 1].type if index + 1 < len(tokens) else ""
                # Beside an expression a line break separates words, unless the text is all white space.
                alone = token.value.isspace()
                left = "w" if before == "variable_end" and not alone else ">"
                right = "w" if after == "variable_begin" and not alone else "<"
                yield Token(token.lineno, "data", _joined(left + token.value + right)[1:-1])
            else:
                yield token


def _joined(text: str) -> str:
    text = re.sub(r"(?<=>)\s*\n\s*|\s*\n\s*(?=<)", "", text)
    return re.sub(r"\s*\n\s*", " ", text)
