"""Matches free-text names to class ids: one class, or none.

Votes are merged, open answers rewarded and predictions scored by these rules, so a spelling variant
is the same class everywhere. A name must match as a whole: a list of names ("boxer, beagle, bengal")
matches nothing, however many classes it holds.

`ClassNames.match` tries these steps in order, and stops at the first one that knows the text:

    exact    the class name, after `normalize` (remarks in parentheses kept)
    alias    a further spelling from the data card
    remark   without what stands around the name: a lead-in ("species: ..."), remarks in parentheses
             ("Bobolink (male)"), other names of the class after a comma, "sp." or "species"
    words    the same words in another order, for names with a model year: "Acura TL Sedan 2012"
    plural   singular, plural and possessive alike: "Anna's Hummingbirds" is "Anna Hummingbird"
    genus    a genus that stands alone, where the card says that one class has it: "Fregata sp."
    inside   the name in parentheses after something unknown, only where the card allows it
    fuzzy    only with a `fuzzy_threshold`: nearly the same string, see `tasks.language.fuzzy`

A text that fits two classes at a step, or whose parts name two classes, matches nothing. Nor does one
that hedges, or whose remark names another class: "Song Sparrow (Melospiza lincolnii)".
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_cards import Card
from tasks.language import remarks
from tasks.language.fuzzy import FuzzyNames
from tasks.language.words import (
    HEDGES,
    MAX_LENGTH,
    Word,
    hangs_on,
    key_of,
    loose_forms,
    normalize,
    singular,
    words,
    year_bag,
)

VERSION = 3  # of the matching rules; raise it when any text would match differently


@dataclass(frozen=True)
class Match:
    """A class id with the step that matched it; or None with none, several or ambiguous."""

    class_id: int | None
    step: str


MAX_OPEN_WORDS = 8  # a longer text that is no class counts as a sentence, not a name
MAX_INSIDE_WORDS = 4  # before a name in parentheses; more are a sentence
_WAVERING = HEDGES - {"and"}  # "and" may stand in a name
# Characters that no name holds: line breaks, and marks that a chat template might interpret.
_NO_NAME = re.compile(r"[\n\r<>{}|\\\[\]]")
_GENUS = re.compile(r"(\w+) spp?\.")  # an alias of this form is a genus
_NONE, _SEVERAL = Match(None, "none"), Match(None, "several")
_REMEMBERED = 100_000  # distinct texts that one ClassNames caches before it clears the cache


class ClassNames:
    """Matches texts against the class names and aliases of a data card.

    `names` are the classes by class id. An alias such as "Fregata sp." is a genus: it means its class
    only where it stands alone. `lead_in` are words that may lead in to a name, beside those of
    `tasks.language.remarks`; `name_in_parentheses` allows the step `inside`. `fuzzy_threshold` (a
    similarity up to 100; 0: off) and `fuzzy_margin` configure the fuzzy step. Raises ValueError when
    two classes, or their aliases, normalise to one name, when a name has no letter or digit or is
    longer than MAX_LENGTH, and when `aliases` names an unknown class.
    """

    def __init__(
        self,
        names: Sequence[str],
        aliases: Mapping[str, Sequence[str]] | None = None,
        *,
        lead_in: str = "",
        name_in_parentheses: bool = False,
        fuzzy_threshold: float = 0.0,
        fuzzy_margin: float = 0.0,
    ):
        self.names = tuple(names)
        self._exact: dict[str, tuple[int, str]] = {}
        self._genera: dict[str, int] = {}
        self._literal: set[str] = set()
        self._remarked: set[int] = set()
        self._loose: dict[tuple[str, str], set[int]] = {}
        self._seen: dict[str, Match] = {}
        own_words = {word.key for word in words(lead_in)}
        self._lead_in = remarks.LEAD_IN | own_words | {f"{word}s" for word in own_words}
        self._scientific = not own_words or "species" in own_words
        self._name_in_parentheses = name_in_parentheses
        owners: dict[str, tuple[int, str]] = {}
        for class_id, name in enumerate(self.names):
            self._add(class_id, name, "exact", repr(name), owners)
        for name, spellings in (aliases or {}).items():
            if name not in self.names:
                raise ValueError(f"aliases are given for {name!r}, which is not among the classes")
            for alias in spellings:
                description = f"{alias!r} (an alias of {name!r})"
                self._add(self.names.index(name), alias, "alias", description, owners)
        self._longest = max((key.count(" ") + 1 for key in self._exact), default=0)
        self._known = {singular(key) for key in self._exact}
        self._fuzzy = None
        if fuzzy_threshold:
            owned = {key: class_id for key, (class_id, _) in self._exact.items()}
            self._fuzzy = FuzzyNames(owned, fuzzy_threshold, fuzzy_margin)

    @classmethod
    def of(
        cls, card: Card, *, fuzzy_threshold: float = 0.0, fuzzy_margin: float = 0.0
    ) -> "ClassNames":
        """The names of a card, read as its own noun and kind and its own `name_in_parentheses`."""
        return cls(
            card.classes,
            card.aliases,
            lead_in=f"{card.noun} {card.kind}",
            name_in_parentheses=card.name_in_parentheses,
            fuzzy_threshold=fuzzy_threshold,
            fuzzy_margin=fuzzy_margin,
        )

    def match(self, text: str) -> Match:
        """The class that `text` names as a whole, or none. Results are cached by text."""
        if len(text) > MAX_LENGTH:
            return _NONE  # not cached
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
        first, *others = remarks.around(remarks.after_lead_in(words(text), self._lead_in)).parts
        rest = [word for part in others if not self._adds_nothing(part) for word in part]
        bare = key_of(first + rest)
        own_words = bare.split()
        if not 0 < len(own_words) <= MAX_OPEN_WORDS or _WAVERING.intersection(own_words):
            return None
        if _NO_NAME.search(text) or self.match(text) != _NONE:
            return None
        key = singular(bare)
        padded = f" {key} "
        if any(f" {known} " in padded or padded in f" {known} " for known in self._known):
            return None
        return " ".join(year_bag(key.split())) or key

    def _match(self, text: str) -> Match:
        tokens = words(text)
        key = key_of(tokens)
        if not key:
            return _NONE
        if text.casefold().strip() not in self._literal and self._lists_several(tokens):
            return _SEVERAL
        if key in self._exact:
            return Match(*self._exact[key])
        tokens = remarks.after_lead_in(tokens, self._lead_in)
        if (key := key_of(tokens)) in self._exact:
            return Match(self._exact[key][0], "remark")
        said = remarks.around(tokens)
        match = self._named(said)
        if match == _NONE and self._name_in_parentheses:
            match = self._inside(said)
        if match == _NONE:
            return self._nearly(said)
        if match.class_id is None:
            return match
        if said.remarks and match.step != "inside" and match.class_id in self._remarked:
            return _NONE  # "Bobolink (female)" is not "Bobolink (male)"
        doubt = any(self._doubts(remark, match.class_id) for remark in said.remarks)
        return _SEVERAL if doubt else match

    def _named(self, said: remarks.Around) -> Match:
        """The class that all parts name together, or the first one where the others confirm it."""
        first, *others = said.parts
        match = self._name(said.outside)
        if match != _NONE or not others:
            return match
        match = self._name(first)
        class_id = match.class_id
        agreed = class_id is not None and all(self._confirms(part, class_id) for part in others)
        return match if agreed else _NONE

    def _name(self, tokens: list[Word]) -> Match:
        """The class that the words name as a whole, with or without "genus", "sp." or "species"."""
        keys = key_of(tokens).split()
        for form in (keys, remarks.without_rank(keys)):
            bare = " ".join(form)
            for step, loose in loose_forms(bare):
                ids = self._loose.get((step, loose), set())
                if ids:
                    return Match(min(ids), step) if len(ids) == 1 else Match(None, "ambiguous")
            if (genus := singular(bare)) in self._genera:
                return Match(self._genera[genus], "genus")
        return _NONE

    def _inside(self, said: remarks.Around) -> Match:
        """The class that the only remark names, after a few words that neither hedge nor name another."""
        if len(said.remarks) != 1 or len(said.outside) > MAX_INSIDE_WORDS:
            return _NONE
        inside = remarks.after_lead_in(said.remarks[0], self._lead_in)
        match = self._named(remarks.Around([inside], []))
        if match.class_id is None or match.step == "genus":
            return _NONE
        doubt = self._doubts(said.outside, match.class_id)
        return _NONE if doubt else Match(match.class_id, "inside")

    def _nearly(self, said: remarks.Around) -> Match:
        """The fuzzy step. A text that hedges never counts as a misspelling."""
        outside = said.outside
        if self._fuzzy is None or _WAVERING.intersection(word.key for word in outside):
            return _NONE
        class_id = self._fuzzy.match(key_of(outside))
        if class_id is None or any(self._doubts(remark, class_id) for remark in said.remarks):
            return _NONE
        return Match(class_id, "fuzzy")

    def _add(
        self,
        class_id: int,
        name: str,
        step: str,
        description: str,
        owners: dict[str, tuple[int, str]],
    ) -> None:
        """Index one spelling; `description` names it in error messages, `owners` are by key."""
        genus = _GENUS.fullmatch(name) if step == "alias" else None
        key = normalize(genus[1] if genus else name, keep_remarks=True)
        if not key:
            raise ValueError(
                f"{description} cannot be a class name: it needs a letter or a digit, and at most "
                f"{MAX_LENGTH} characters"
            )
        other_id, other = owners.setdefault(key, (class_id, description))
        if other_id != class_id:
            raise ValueError(f"{description} and {other} are the same name, {key!r}: change one")
        if genus:
            self._genera[singular(key)] = class_id
            return
        self._exact.setdefault(key, (class_id, step))
        self._literal.add(name.casefold().strip())
        bare = normalize(name)
        if step == "exact" and bare != key:
            self._remarked.add(class_id)
        for loose in loose_forms(bare):
            self._loose.setdefault(loose, set()).add(class_id)

    def _lists_several(self, tokens: list[Word]) -> bool:
        """Whether the parts of the text between separators name at least two classes."""
        parts: list[list[Word]] = [[]]
        for word in tokens:
            if word.key not in ("or", "and"):
                parts[-1].append(word)
            if word.key in ("or", "and") or not hangs_on(word):
                parts.append([])
        if len(parts) < 2:
            return False
        keys = map(key_of, parts)
        return len({self._exact[key][0] for key in keys if key in self._exact}) > 1

    def _confirms(self, part: list[Word], class_id: int) -> bool:
        """Whether a part after the name says no more than it: another name, sex, age, a scientific name."""
        part = remarks.after_lead_in(part, self._lead_in)
        match = self._name(part)
        if match != _NONE:
            return match.class_id == class_id
        return self._adds_nothing(part) and not self._doubts(part, class_id)

    def _adds_nothing(self, part: list[Word]) -> bool:
        """Whether what follows a name tells its sex or age, or is or looks like a scientific name."""
        return remarks.tells_nothing(part) or (self._scientific and remarks.looks_scientific(part))

    def _doubts(self, remark: list[Word], class_id: int) -> bool:
        """Whether a remark hedges, or names another class than `class_id`."""
        keys = [word.key for word in remark]
        single, start = [singular(key) for key in keys], 0
        while start < len(keys):
            # The longest name counts: the "marigold" of "pot marigold" is no second class.
            ends = range(min(len(keys), start + self._longest), start, -1)
            spans = (
                (end, self._loose.get(("plural", " ".join(single[start:end])))) for end in ends
            )
            end, named = next((span for span in spans if span[1]), (start + 1, None))
            # A genus with a species after it, as in "Carduelis tristis", does not stand alone.
            if not named and set(keys[end : end + 1]) <= remarks.RANKS:
                named = {self._genera.get(single[start], class_id)}
            if named and class_id not in named:
                return True
            start = end
        return not (HEDGES.isdisjoint(keys) or remarks.tells_stage(remark))
