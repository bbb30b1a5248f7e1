"""Which names count: the classes of a card and, with an open vocabulary, names that are no class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_cards import Card
from tasks.language.class_names import ClassNames

OPEN = -1  # the class id of a name that is no class of the card


@dataclass(frozen=True)
class Vocabulary:
    """What may become a candidate: the classes `allowed` and, with `open`, names that are no class.

    An answer that names a class outside `allowed` never becomes a candidate, however it is spelled.
    """

    names: ClassNames
    allowed: frozenset[int]
    open: bool = False

    @classmethod
    def of(cls, card: Card, reading: Mapping[str, Any]) -> "Vocabulary":
        """All classes of a card, read as `reading` says.

        It holds settings of [BuildMCQ]: vocabulary, fuzzy_threshold, fuzzy_margin; else names are read
        with a closed vocabulary, and misspelt ones match no class.
        """
        fuzzy = {key: reading[key] for key in ("fuzzy_threshold", "fuzzy_margin") if key in reading}
        allowed = frozenset(range(len(card.classes)))
        return cls(ClassNames.of(card, **fuzzy), allowed, reading.get("vocabulary") == "open")

    def read(self, text: str) -> tuple[int, str, str]:
        """(class id, step, open key) of an answer; the key is "" unless it is an open candidate."""
        match = self.names.match(text)
        if match.class_id is not None:
            return match.class_id, match.step, ""
        key = self.names.open_key(text) if self.open else None
        return OPEN, match.step if key is None else "open", key or ""
