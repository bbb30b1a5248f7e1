"""How near an answer is to the truth in a card's taxonomy: the groups that the two have in common."""

from collections.abc import Mapping, Sequence

from data_cards import Card
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError


class Taxonomy:
    """The groups of a card's classes, such as genera, or makers and models.

    `classes` are the names by class id. `groups` maps a group to its classes, each group before the
    groups within it, as `Card.taxonomy` does. `lead_in` is that of ClassNames. Raises StageError when two groups are spelled alike.
    """

    def __init__(
        self, classes: Sequence[str], groups: Mapping[str, Sequence[str]], *, lead_in: str = ""
    ):
        by_class: dict[str, list[str]] = {name: [] for name in classes}
        self._of_group: dict[str, tuple[str, ...]] = {}
        for group, names in groups.items():
            for name in names:
                by_class[name].append(group)
            if names:
                self._of_group[group] = tuple(by_class[names[0]])
        self._of_class = [tuple(by_class[name]) for name in classes]
        longer = {g: [" ".join(above)] for g, above in self._of_group.items() if len(above) > 1}
        try:
            # A group within a group also goes by both names: 737 is Boeing 737.
            self._names = ClassNames(tuple(self._of_group), longer, lead_in=lead_in)
        except ValueError as error:
            raise StageError(f"the card's taxonomy: {error}") from error

    @classmethod
    def of(cls, card: Card) -> "Taxonomy":
        """The taxonomy of a card, whose groups are read as its own noun and kind."""
        return cls(card.classes, card.taxonomy, lead_in=f"{card.noun} {card.kind}")

    def __bool__(self) -> bool:
        return bool(self._of_group)

    def group(self, text: str) -> str | None:
        """The group that `text` names as a whole, in any spelling; None for another text."""
        place = self._names.match(text).class_id if text else None
        return None if place is None else self._names.names[place]

    def shared(self, truth: int, class_id: int | None, text: str = "") -> int:
        """How many groups of the class `truth` hold the answer too.

        The answer is the class `class_id`, or, where that is None, what `text` names.
        """
        if class_id is not None:
            groups: tuple[str, ...] = self._of_class[class_id]
        else:
            groups = self._of_group.get(self.group(text) or "", ())
        same = [a == b for a, b in zip(self._of_class[truth], groups, strict=False)]
        return [*same, False].index(False)

    def depth(self, truth: int, class_id: int | None, text: str = "") -> float:
        """The share of the way from the root to the class `truth` that the answer gets right.

        1 for the class itself. With one level of groups, another class of the right group has 0.5,
        as has the name of that group alone; with two levels there are thirds.
        """
        levels = len(self._of_class[truth]) + 1
        right = levels if class_id == truth else self.shared(truth, class_id, text)
        return right / levels
