"""Pairs of questions with the same options, on images of two classes that the policy confuses.

After TAPO's contrast of images of different classes (Fine-R1, arXiv 2602.07605), with the policy's own
confusions. A question's partner shows the same options in the same order, so only the picture tells
which of them is right. Both are asked in one optimiser step.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.language.prompts import LETTERS
from tasks.tables.schemas import JOINT
from tasks.tables.seeding import place_of

COLUMNS = (
    "mcq_id",
    "image_id",
    "option_class_ids",
    "option_votes",
    "answer_letter",
    "truth_share",
)


class Use(NamedTuple):
    """A place in training: the question whose options are asked, and the one whose image is shown.

    They are one question, unless this is a partner. `paired` says whether it is one of a pair.
    """

    question: int
    epoch: int
    image: int
    paired: bool = False


class Pairs:
    """The partners of frozen questions; `columns` are COLUMNS of the shards.

    A question's partner shows an image of the class that the policy most often confuses with the truth:
    of the wrong options the one with the most votes over all questions with this truth. The image is
    that of a question about this class, drawn anew from (seed, epoch, question). A question has no
    partner where no wrong option was ever confused with the truth or has a question of its own.
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], seed: int):
        self._seed = seed
        self.ids, self.image_ids = columns["mcq_id"], columns["image_id"]
        self._truth_shares = columns["truth_share"]
        self._options: list[list[tuple[str, int]]] = [
            [(image_id.split("/")[0], class_id) for class_id in class_ids]
            for image_id, class_ids in zip(
                columns["image_id"], columns["option_class_ids"], strict=True
            )
        ]
        self._truths = [
            options[LETTERS.index(letter)]
            for options, letter in zip(self._options, columns["answer_letter"], strict=True)
        ]
        confused: dict[tuple[str, int], Counter[tuple[str, int]]] = defaultdict(Counter)
        self._about: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, truth in enumerate(self._truths):
            self._about[truth].append(number)
            for option, votes in zip(
                self._options[number], columns["option_votes"][number], strict=True
            ):
                confused[truth][option] += votes
        self.partner_classes = [
            self._most_confused(number, confused[truth])
            for number, truth in enumerate(self._truths)
        ]

    @property
    def plain(self) -> int:
        """How many questions have no partner."""
        return sum(option is None for option in self.partner_classes)

    def _most_confused(
        self, number: int, confused: Mapping[tuple[str, int], int]
    ) -> tuple[str, int] | None:
        options = [
            option
            for option in self._options[number]
            if option != self._truths[number] and confused[option] and option in self._about
        ]
        return min(options, key=lambda option: (-confused[option], option), default=None)

    def partner(self, question: int, epoch: int) -> int | None:
        """The question whose image the partner shows; None where there is no partner."""
        option = self.partner_classes[question]
        if option is None:
            return None
        about = self._about[option]
        return about[place_of(f"{self._seed}/{epoch}/{self.ids[question]}") % len(about)]

    def placed(self, order: Sequence[tuple[int, int]], per_step: int) -> list[Use]:
        """The questions of `order`, (question, epoch) each, with their partners after them.

        A pair never stands in two steps of `per_step` places each: a question on the last place of a
        step is asked without its partner.
        """
        uses: list[Use] = []
        for question, epoch in order:
            other = self.partner(question, epoch)
            paired = other is not None and (len(uses) + 1) % per_step != 0
            uses.append(Use(question, epoch, question, paired))
            if paired and other is not None:
                uses.append(Use(question, epoch, other, True))
        return uses

    def filled(
        self, order_of: Callable[[int], list[tuple[int, int]]], places: int, per_step: int
    ) -> list[Use]:
        """As many questions and partners as fill `places`, a multiple of `per_step`.

        `order_of(count)` is the order of so many questions. A curriculum sorts those that it is asked for,
        so it is asked for as many as are needed and no more.
        """
        if places % per_step:
            raise ValueError(f"{places} places are no whole steps of {per_step}")
        low, high = places // 2, places
        while low < high:
            middle = (low + high) // 2
            if len(self.placed(order_of(middle), per_step)) >= places:
                high = middle
            else:
                low = middle + 1
        return self.placed(order_of(low), per_step)[:places]

    def posed(self, row: Mapping[str, Any], use: Use) -> dict[str, Any]:
        """A question's row as it is asked at a place, with the column `pair`.

        Both questions of a pair have the same `pair`, and a plain question has "". A partner has the
        image's answer, and its id joins both questions' ids.
        """
        pair = f"{use.epoch}/{row['mcq_id']}" if use.paired else ""
        if use.image == use.question:
            return {**row, "pair": pair}
        letter = LETTERS[self._options[use.question].index(self._truths[use.image])]
        return {
            **row,
            "pair": pair,
            "mcq_id": f"{row['mcq_id']}{JOINT}{self.ids[use.image]}",
            "image_id": self.image_ids[use.image],
            "answer_letter": letter,
            "truth_share": self._truth_shares[use.image],
        }
