"""Draws one test image with the answers before and after training, as a figure for a README or a slide."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.pages import render
from tasks.pages.figures import Figure
from tasks.pages.text import label

MODES = ("one_step", "two_step")
PICTURE = 150  # width of the picture, and of the column below it, in units
COLUMN = 350  # width of a policy's column
LETTERS_A_LINE = 52
LINE = 16  # height of a line
Piece = tuple[str, str]


def example_figure(gallery: Mapping[str, Any]) -> Figure | None:
    """The gallery's first image that training won in all MODES, preferably novel; None without one.

    `gallery` is the result of `gallery_values`.
    """
    won = [card for kind in gallery["kinds"] if kind["key"] == "won" for card in kind["cards"]]
    won = [card for card in won if card["picture"] and _won_throughout(card["sides"])]
    if not won:
        return None
    card = next((card for card in won if card["group"] == "novel"), won[0])
    columns = [_column(side) for side in card["sides"]]
    height = LINE * max(len(card["decided_by"]) + 14, *(len(lines) + 1 for lines in columns))
    title = f"{card['truth']}, a {card['group']} class"
    chart = render(
        "example.svg.jinja",
        card=card,
        columns=[
            (PICTURE + 30 + index * (COLUMN + 15), lines) for index, lines in enumerate(columns)
        ],
        title=title,
        width=PICTURE + 30 + len(columns) * (COLUMN + 15),
        height=height,
        picture=PICTURE,
        line=LINE,
    )
    note = (
        "The first test image, in the order of a hash of its id, that training won in each mode shown. "
        "Underlined: the words that decide, wavy where they are wrong."
    )
    rows = [
        (side["name"], a["mode"], a["correct"], a["chosen"] or a["text"], _text(a["completion"]))
        for side in card["sides"]
        for a in _shown(side)
    ]
    header = ("policy", "mode", "correct", "answer", "completion")
    return Figure("example", title, note, chart, header, rows)


def _won_throughout(sides: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every answer was wrong before and is right after."""
    correct = [[answer["correct"] for answer in _shown(side)] for side in sides]
    return len(sides) == 2 and not any(correct[0]) and all(correct[1])


def _shown(side: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [answer for answer in side["answers"] if answer["mode"] in MODES]


def _column(side: Mapping[str, Any]) -> list[tuple[str, list[Piece]]]:
    """The lines of a policy's column, each with its style and its pieces of text."""
    lines: list[tuple[str, list[Piece]]] = [("", [(label(side["name"]), "")])]
    for answer in _shown(side):
        verdict = "right" if answer["correct"] else "wrong"
        named = answer["chosen"] or answer["text"]
        lines.append(
            ("row", [(f"{label(answer['mode'])}: {named}", ""), ("  ", ""), (verdict, verdict)])
        )
        for option in answer["options"]:
            tags = f" ({option['tags']})" if option["tags"] else ""
            lines.append(("row", [(f"{option['letter']}. {option['text']}{tags}", "")]))
        lines += [("", pieces) for pieces in _wrapped(answer["completion"])]
    return lines


def _wrapped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces in lines of at most LETTERS_A_LINE letters, broken between words."""
    text = _text(pieces)
    lines: list[list[int]] = []
    for word in re.finditer(r"\S+", text):
        fits = lines and word.end() - lines[-1][0] <= LETTERS_A_LINE
        if fits and "\n" not in text[lines[-1][1] : word.start()]:
            lines[-1][1] = word.end()
        else:
            lines.append([word.start(), word.end()])
    return [list(_within(pieces, start, end)) for start, end in lines]


def _within(pieces: Sequence[Piece], start: int, end: int) -> Iterator[Piece]:
    """The parts of the pieces between two offsets of their joined text."""
    at = 0
    for text, mark in pieces:
        if part := text[max(0, start - at) : max(0, end - at)]:
            yield part, mark
        at += len(text)


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(text for text, _ in pieces)
