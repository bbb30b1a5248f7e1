"""Decides which training images need no further samples: those whose every answer names the truth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tasks.language import answers
from tasks.language.class_names import ClassNames
from tasks.tables.ids import Ids, Labels


@dataclass(frozen=True)
class AllNameTheTruth:
    """`tasks.engines.refusals.Enough` for Propose.

    BuildMCQ skips an image whose only candidate is the truth. So an image is done when each of its
    samples, after one of `counts` of them, names the truth. `labels` are class ids by image.
    """

    counts: tuple[int, ...]
    labels: Mapping[str, int]
    names: ClassNames

    def only(self, keys: Sequence[str]) -> "AllNameTheTruth":
        """The same rule for these images alone."""
        return replace(self, labels=Labels(Ids(keys), [self.labels[key] for key in keys]))

    def __call__(self, key: str, completions: Sequence[Any]) -> bool:
        read = (answers.parse(completion.text).answer for completion in completions)
        return all(
            answer is not None and self.names.match(answer).class_id == self.labels[key]
            for answer in read
        )
