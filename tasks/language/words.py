"""Splits free text into normalised words: the basis for matching class names and reading options.

Names are compared by their words: in lower case, one space apart, without accents, apostrophes and
invisible characters. The rules for model years, hedges and remarks in parentheses are here as well,
because class names and options share them.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

MAX_LENGTH = 500  # characters; a longer text is no name, and normalising takes quadratic time
HEDGES = frozenset(
    """or and nor either neither both any all none not no maybe perhaps possibly probably likely
    unlikely unsure uncertain versus vs rather alternatively could might unless else possible
    probable presumably presumable presumed apparent apparently seemingly suspected tentative
    tentatively potential potentially supposedly unconfirmed doubtful questionable similar example
    """.split()  # noqa: SIM905 - as a list it would take a screen
)

_YEAR = re.compile(r"(?:19|20)\d\d")
REMARK = re.compile(r"[(（]([^()（）]*)[)）]")
# What may separate two words of one name. Anything else may be the comma of a list.
_WITHIN_NAME = re.compile(r"[ \t]*|[-\u2010-\u2015\u2212_]")
_ABBREVIATIONS = ("st", "mt", "ft", "dr")
_WORD = re.compile(r"w[wm]*\+*")  # over a mask of the text: w a letter or digit, m a combining mark
_ACCENTS = re.compile("[\u0300-\u036f\ufe00-\ufe0f]")  # and variation selectors
_MARKUP: dict[str, str | None] = {mark: None for mark in "'`´‘’‛′ʹʻʼʽˈ＇"} | {"&": " and "}
_REPLACED = str.maketrans(_MARKUP)


class Word(NamedTuple):
    """A word of a text: its `key` for comparison, its `raw` spelling, the text `before` and `after` it."""

    key: str
    raw: str
    before: str
    after: str


def words(text: str) -> list[Word]:
    """The words of `text`: runs of letters, digits and marks, a trailing "+" included.

    Hyphens of every kind, underscores and punctuation separate words; apostrophes and invisible
    characters vanish; accents of Latin, Greek and Cyrillic letters are dropped.
    """
    if len(text) > MAX_LENGTH:
        return []
    text = _plain(text)
    mask = "".join(_kind(char) for char in text)
    spans = [match.span() for match in _WORD.finditer(mask)]
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    gaps = [text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]
    return [
        Word(_plain(text[start:end].casefold()), text[start:end], gaps[i], gaps[i + 1])
        for i, (start, end) in enumerate(spans)
    ]


def hangs_on(word: Word) -> bool:
    """Whether the next word can belong to the same name: after a space, a hyphen, or "St."."""
    shortened = word.key in _ABBREVIATIONS and word.after in (".", ". ")
    return shortened or _WITHIN_NAME.fullmatch(word.after) is not None


def without_article(tokens: list[Word]) -> list[Word]:
    """Drop leading articles, but keep the "An" of "An-12" and the "A" of "A-10"."""
    while len(tokens) > 1 and tokens[0].key in ("a", "an", "the"):
        article, following = tokens[0].key, tokens[1].key
        if article != "the" and not (following[0].isalpha() or _YEAR.fullmatch(following)):
            break
        tokens = tokens[1:]
    return tokens


def without_remarks(text: str) -> str:
    """The text without its remarks in parentheses, unless there is nothing else."""
    rest = REMARK.sub(" ", text)
    return rest if any(char.isalnum() for char in rest) else text


def normalize(text: str, *, keep_remarks: bool = False) -> str:
    """The form in which two names are compared: lower-case words, one space apart.

    Returns "" for a text without a letter or digit, or longer than MAX_LENGTH characters.
    `keep_remarks` keeps the words that stand in parentheses, which otherwise are dropped.
    """
    if len(text) > MAX_LENGTH:
        return ""
    return key_of(words(text if keep_remarks else without_remarks(text)))


def key_of(tokens: list[Word]) -> str:
    """The words as `normalize` gives them: without articles before them, one space apart."""
    return " ".join(word.key for word in without_article(tokens))


def singular(key: str) -> str:
    """A normalised name with each word in the singular."""
    return " ".join(_singular(word) for word in key.split())


def _singular(word: str) -> str:
    """A word without its English plural or possessive s. Short words and codes are left as they are."""
    if len(word) < 4 or not word.isalpha() or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    return word.removesuffix("s")


def year_bag(keys: Iterable[str]) -> tuple[str, ...]:
    """The words in sorted order, if one of them is a model year; else (), because order matters."""
    bag = tuple(sorted(keys))
    return bag if any(_YEAR.fullmatch(key) for key in bag) else ()


def loose_forms(bare: str) -> list[tuple[str, str]]:
    """(matching step, form of a normalised name) for each form under which a looser step finds it."""
    forms = [("remark", bare), ("plural", singular(bare))]
    bag = year_bag(bare.split())
    return [forms[0], ("words", " ".join(bag)), forms[1]] if bag else forms


def _plain(text: str) -> str:
    """The text in NFKC, without accents, apostrophes and invisible characters."""
    if text.isascii():
        return text.translate(_REPLACED)
    shown = (char for char in text.translate(_REPLACED) if unicodedata.category(char) != "Cf")
    split = unicodedata.normalize("NFKD", "".join(shown))
    return unicodedata.normalize("NFKC", _ACCENTS.sub("", split)).translate(_REPLACED)


def _kind(char: str) -> str:
    """A character's letter in the mask: w, m, or itself."""
    mark = unicodedata.category(char) in ("Mn", "Mc")
    return "w" if char.isalnum() else "m" if mark else char
