"""Splits an answer into a name and what stands around it: a lead-in before it, remarks after it.

Models rarely answer with a bare name: "Species name: northern cardinal", "gadwall (Mareca strepera)",
"spotted catbird, Ailuroedus melanotis", "mallard (female or juvenile)". The parts are found here. What
they mean for a class is decided in `tasks.language.class_names`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tasks.language.words import REMARK, Word, hangs_on, key_of, words

# A lead-in of such words ends in a colon: "species name:", "make and model:", "the bird is:".
LEAD_IN = frozenset(
    """name names species subspecies genus breed make model variant type kind class category common
    scientific latin english full exact specific correct final answer identification id label year maker
    manufacturer the an this that its it is of in for and image picture photo photograph shown
    animal plant cat dog vehicle plane airplane
    """.split()  # noqa: SIM905 - as a list it would take a screen
)
_LONGEST_LEAD_IN = 10  # words
# Sex, age and plumage. They tell nothing about the class, so "female or juvenile" is no hedge.
_STAGES = frozenset(
    """male female males females juvenile juveniles immature immatures adult adults subadult young
    chick hen cock drake fledgling nestling breeding nonbreeding eclipse plumage puppy kitten cub
    summer winter spring autumn
    """.split()  # noqa: SIM905 - as a list it would take a screen
)
_BESIDE_STAGES = frozenset({"or", "and", "in", "with", "a", "an", "the", "non", "bird", "full"})
RANKS = frozenset({"sp", "spp", "ssp", "subsp", "species", "genus"})
# The scientific names that all breeds of cats or of dogs share: they tell nothing about the class.
_SHARED = frozenset(
    {
        "felis catus",
        "felis silvestris catus",
        "felis domesticus",
        "canis familiaris",
        "canis lupus familiaris",
    }
)
# What ends a part of an answer. Spaces, hyphens inside a word, marks of emphasis and colons do not.
_ENDS_PART = re.compile(r"[^\s\w:*\"“”«»'‘’\-‐-―−]|\n|\s[-‐-―−]+\s")
# How the two words of a scientific name end, such as Ailuroedus melanotis, Larus argentatus.
_GENUS_ENDS = re.compile(r"[a-z]+(?:us|a|um|is|es|os|as|o|ps|yx|ys|on)")
_SPECIES_ENDS = re.compile(r"[a-z]+(?:us|a|um|is|i|ae|ns|or|oides|ops)")


class Around(NamedTuple):
    """The words of an answer: `parts` between its separators, and `remarks` in parentheses or brackets."""

    parts: list[list[Word]]
    remarks: list[list[Word]]

    @property
    def outside(self) -> list[Word]:
        """The words of all parts."""
        return [word for part in self.parts for word in part]


def after_lead_in(tokens: list[Word], known: frozenset[str] = LEAD_IN) -> list[Word]:
    """The words after the lead-in, which is made of `known` words; all of them if there is none."""
    for index, word in enumerate(tokens[:_LONGEST_LEAD_IN]):
        if word.key not in known:
            break
        if ":" in word.after:
            return after_lead_in(tokens[index + 1 :], known)
    return tokens


def around(tokens: Sequence[Word]) -> Around:
    """Split words at separators and at parentheses. A name in parentheses alone is a part."""
    parts: list[list[Word]] = [[]]
    remarks: list[list[Word]] = []
    depth = 0
    for index, word in enumerate(tokens):
        opened, closed = (sum(map(word.before.count, marks)) for marks in ("([", ")]"))
        begins = opened and (closed or not depth)
        depth = max(0, depth + opened - closed)
        if depth:
            if begins:
                remarks.append([])
            remarks[-1].append(word)
            continue
        if parts[-1] and index and _separates(tokens[index - 1]):
            parts.append([])
        parts[-1].append(word)
    if not parts[0]:
        return Around(remarks or [[]], [])
    return Around(parts, remarks)


def without_rank(keys: list[str]) -> list[str]:
    """The words without "genus" before them and "sp.", "spp." or "species" after them."""
    if len(keys) > 1 and keys[-1] in RANKS:
        keys = keys[:-1]
    return keys[1:] if len(keys) > 1 and keys[0] == "genus" else keys


def tells_stage(tokens: Sequence[Word]) -> bool:
    """Whether the words tell only sex, age or plumage: "female or juvenile"."""
    said = {word.key for word in tokens}
    return bool(said & _STAGES) and said <= _STAGES | _BESIDE_STAGES


def without_stages(text: str, names: frozenset[str]) -> str:
    """The text without remarks in parentheses on sex, age or plumage that have no word of `names`."""

    def shown(remark: re.Match[str]) -> str:
        tokens = words(remark[1])
        stages = _STAGES.intersection(word.key for word in tokens)
        return " " if tells_stage(tokens) and stages.isdisjoint(names) else remark[0]

    return REMARK.sub(shown, text)


def tells_nothing(tokens: Sequence[Word]) -> bool:
    """Whether the words tell only sex, age or plumage, or a name that all breeds share: "Felis catus"."""
    return tells_stage(tokens) or key_of(list(tokens)) in _SHARED


def looks_scientific(tokens: Sequence[Word]) -> bool:
    """Whether two words, or three with a subspecies, look like a scientific name.

    Models often misspell those that a card lists.
    """
    if len(tokens) not in (2, 3):
        return False
    genus, *others = (token.key for token in tokens)
    ends = all(_SPECIES_ENDS.fullmatch(name) or name == genus for name in others)  # Buteo buteo
    return bool(_GENUS_ENDS.fullmatch(genus) and ends)


def _separates(word: Word) -> bool:
    """Whether a part of the answer ends after `word`: at a comma, say, but not after "St."."""
    return not hangs_on(word) and _ENDS_PART.search(word.after) is not None
