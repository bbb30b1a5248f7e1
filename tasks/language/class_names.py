"""Matches free-text names to class ids: one class, or none.

Votes are merged, open answers rewarded and predictions scored by these rules, so a spelling variant
is the same class everywhere. A name must match as a whole: a list of names ("boxer, beagle, bengal")
matches nothing, however many classes it holds.

`ClassNames.match` tries these steps in order, and stops at the first one that knows the text:

    exact    the class name, after `normalize` (remarks in parentheses kept)
    alias    a further spelling from the data card
    remark   without remarks in parentheses: "Bobolink (male)" is "Bobolink"
    words    the same words in another order, for names with a model year: "Acura TL Sedan 2012"
    plural   singular, plural and possessive alike: "Anna's Hummingbirds" is "Anna Hummingbird"
    fuzzy    only with a `fuzzy_threshold`: nearly the same string, see `tasks.language.fuzzy`

A text that fits two classes at a step, or whose parts name two classes, matches nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.language.fuzzy import FuzzyNames
from tasks.language.words import (
    HEDGES,
    MAX_LENGTH,
    REMARK,
    Word,
    hangs_on,
    normalize,
    without_article,
    words,
    year_bag,
)

VERSION = 1  # of the matching rules; raise it when any text would match differently

MAX_OPEN_WORDS = 8  # a longer text that is no class counts as a sentence, not a name
_WAVERING = HEDGES - {"and"}  # "and" may stand in a name

# Characters that no name holds: line breaks, and marks that a chat template might interpret.
_NO_NAME = re.compile(r"[\n\r<>{}|\\\[\]]")
_REMEMBERED = 100_000  # distinct texts that one ClassNames caches before it clears the cache


@dataclass(frozen=True)
class Match:
    """A class id with the step that matched it; or None with none, several or ambiguous."""

    class_id: int | None
    step: str


class ClassNames:
    """Matches texts against the class names and aliases of a data card.

    `names` are the classes by class id. `fuzzy_threshold` (a similarity up to 100; 0: off) and
    `fuzzy_margin` configure the fuzzy step. Raises ValueError when two classes, or their aliases,
    normalise to one name, when a name has no letter or digit or is longer than MAX_LENGTH, and when
    `aliases` names an unknown class.
    """

    def __init__(
        self,
        names: Sequence[str],
        aliases: Mapping[str, Sequence[str]] | None = None,
        *,
        fuzzy_threshold: float = 0.0,
        fuzzy_margin: float = 0.0,
    ):
        self.names = tuple(names)
        self._exact: dict[str, tuple[int, str]] = {}
        self._literal: set[str] = set()
        self._remarked: set[int] = set()
        self._loose: dict[tuple[str, str], set[int]] = {}
        self._seen: dict[str, Match] = {}
        owners: dict[str, str] = {}
        for class_id, name in enumerate(self.names):
            self._add(class_id, name, "exact", repr(name), owners)
        for name, spellings in (aliases or {}).items():
            if name not in self.names:
                raise ValueError(f"aliases are given for {name!r}, which is not among the classes")
            for alias in spellings:
                description = f"{alias!r} (an alias of {name!r})"
                self._add(self.names.index(name), alias, "alias", description, owners)
        self._longest = max((key.count(" ") + 1 for key in self._exact), default=0)
        self._known = {_singular_key(key) for key in self._exact}
        self._fuzzy = None
        if fuzzy_threshold:
            owned = {key: class_id for key, (class_id, _) in self._exact.items()}
            self._fuzzy = FuzzyNames(owned, fuzzy_threshold, fuzzy_margin)

    def match(self, text: str) -> Match:
        """The class that `text` names as a whole, or none. Results are cached by text."""
        if len(text) > MAX_LENGTH:
            return Match(None, "none")  # not cached
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        if text not in self._seen:
            self._seen[text] = self._match(text)
        return self._seen[text]

    def open_key(self, text: str) -> str | None:
        """The key of an open name, one that is no class; None if the text must not become a candidate.

        Spelling variants and plurals share a key. The key is None for a text that hedges or is no
        plain name of at most MAX_OPEN_WORDS words, for one that `match` knows or finds ambiguous,
        and for one that contains a class name or is part of one: "Albatross" and "young Laysan
        Albatross" are no wrong answers about a Laysan Albatross.
        """
        bare = normalize(text)
        own_words = bare.split()
        if not 0 < len(own_words) <= MAX_OPEN_WORDS or _WAVERING.intersection(own_words):
            return None
        if _NO_NAME.search(text) or self.match(text) != Match(None, "none"):
            return None
        key = _singular_key(bare)
        padded = f" {key} "
        if any(f" {known} " in padded or padded in f" {known} " for known in self._known):
            return None
        bag = year_bag(key.split())
        return " ".join(bag) if bag else key

    def _match(self, text: str) -> Match:
        key = normalize(text, keep_remarks=True)
        if not key:
            return Match(None, "none")
        if text.casefold().strip() not in self._literal and self._lists_several(text):
            return Match(None, "several")
        if key in self._exact:
            return Match(*self._exact[key])
        bare = normalize(text)
        for step, form in _loose_forms(bare):
            ids = self._loose.get((step, form), set())
            if len(ids) > 1:
                return Match(None, "ambiguous")
            if ids:
                class_id = next(iter(ids))
                if key != bare and class_id in self._remarked:
                    return Match(None, "none")  # "Bobolink (female)" is not "Bobolink (male)"
                vague = self._remarks_doubt(text, class_id)
                return Match(None, "several") if vague else Match(class_id, step)
        return self._nearly(text, bare)

    def _nearly(self, text: str, bare: str) -> Match:
        """The fuzzy step. A text that hedges never counts as a misspelling."""
        own_words = normalize(text, keep_remarks=True).split()
        if self._fuzzy is None or _WAVERING.intersection(own_words):
            return Match(None, "none")
        class_id = self._fuzzy.match(bare)
        if class_id is None or self._remarks_doubt(text, class_id):
            return Match(None, "none")
        return Match(class_id, "fuzzy")

    def _add(
        self, class_id: int, name: str, step: str, description: str, owners: dict[str, str]
    ) -> None:
        """Index one spelling; `description` names it in error messages, `owners` by key."""
        key = normalize(name, keep_remarks=True)
        if not key:
            raise ValueError(
                f"{description} cannot be a class name: it needs a letter or a digit, and at most "
                f"{MAX_LENGTH} characters"
            )
        other_id, _ = self._exact.setdefault(key, (class_id, step))
        if other_id != class_id:
            raise ValueError(
                f"{description} and {owners[key]} are the same name, {key!r}: change one"
            )
        owners.setdefault(key, description)
        self._literal.add(name.casefold().strip())
        bare = normalize(name)
        if step == "exact" and bare != key:
            self._remarked.add(class_id)
        for loose in _loose_forms(bare):
            self._loose.setdefault(loose, set()).add(class_id)

    def _lists_several(self, text: str) -> bool:
        """Whether the parts of `text` between separators name at least two classes."""
        parts: list[list[Word]] = [[]]
        for word in words(text):
            if word.key not in ("or", "and"):
                parts[-1].append(word)
            if word.key in ("or", "and") or not hangs_on(word):
                parts.append([])
        keys = (" ".join(word.key for word in without_article(part)) for part in parts)
        return len({self._exact[key][0] for key in keys if key in self._exact}) > 1

    def _remarks_doubt(self, text: str, class_id: int) -> bool:
        """Whether a remark hedges, or names another class than `class_id`."""
        for remark in REMARK.findall(text):
            keys = [word.key for word in words(remark)]
            if HEDGES.intersection(keys):
                return True
            for start in range(len(keys)):
                for end in range(start + 1, min(len(keys), start + self._longest) + 1):
                    named = self._exact.get(" ".join(keys[start:end]))
                    if named is not None and named[0] != class_id:
                        return True
        return False


def _loose_forms(bare: str) -> list[tuple[str, str]]:
    """(step, form of the name) for each step after exact and alias, in order."""
    forms = [("remark", bare), ("plural", _singular_key(bare))]
    bag = year_bag(bare.split())
    return [forms[0], ("words", " ".join(bag)), forms[1]] if bag else forms


def _singular_key(key: str) -> str:
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
