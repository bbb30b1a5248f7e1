"""The votes of images: candidates, distinct answers, and which names may become candidates."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.language.class_names import ClassNames

OPEN = -1  # the class id of a name that is no class of the card


class Candidate(NamedTuple):
    """A distinct class among an image's rollouts; `logprob` is the mean over its votes, in nats.

    A name that is no class (`vocabulary = open`) has class id -1 and `name` in its most frequent
    spelling; for a class `name` is "".
    """

    class_id: int
    votes: int
    logprob: float
    name: str = ""


class Answer(NamedTuple):
    """A distinct answer of an image: its text ("" if unreadable), how often it came, the class it
    names (-1: none) and the step of `tasks.language.class_names` or `tasks.language.answers` that decided so."""

    text: str
    votes: int
    class_id: int
    step: str


@dataclass
class Votes:
    """One image's rollouts, merged: candidates by falling votes, and what could not be counted.

    `num_outside` counts answers that may not be candidates; `answers` lists every distinct answer
    by falling votes.
    """

    candidates: list[Candidate]
    num_rollouts: int
    num_unparsed: int
    num_outside: int
    answers: list[Answer]


@dataclass(frozen=True)
class Vocabulary:
    """What may become a candidate: the classes `allowed`, and with `open` names of no class.

    An answer that names a class outside `allowed` never becomes one, in whatever spelling.
    """

    names: ClassNames
    allowed: frozenset[int]
    open: bool = False

    def read(self, text: str) -> tuple[int, str, str]:
        """(class id, step, open key) of an answer; the key is "" for all but open candidates."""
        match = self.names.match(text)
        if match.class_id is not None:
            return match.class_id, match.step, ""
        key = self.names.open_key(text) if self.open else None
        return OPEN, match.step if key is None else "open", key or ""


@dataclass(frozen=True)
class Merged:
    """Merged votes of the images `start` to `stop`, as columns.

    `counts` is (images, 3): rollouts, unparsed, outside. Image i has the candidates
    `starts[i]:starts[i + 1]` and the answers `answer_starts[i]:answer_starts[i + 1]`.
    """

    start: int
    stop: int
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    votes: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    names: dict[int, str]  # of open candidates, by place
    answer_starts: NDArray[np.int64]
    answer_codes: NDArray[np.int32]  # into the lists below
    answer_votes: NDArray[np.int32]
    texts: list[str]
    steps: list[str]
    answer_class_ids: NDArray[np.int32]

    def candidates(self) -> list[Candidate]:
        """The candidates of all images, one after the other; `starts` tells them apart."""
        columns = (c.tolist() for c in (self.class_ids, self.votes, self.logprobs))
        candidates = list(starmap(Candidate, zip(*columns, strict=True)))
        for place, name in self.names.items():
            candidates[place] = candidates[place]._replace(name=name)
        return candidates

    def images(self) -> Iterator[Votes]:
        """All that is known of each image."""
        candidates = self.candidates()
        answer_list = [
            Answer(self.texts[code], votes, int(self.answer_class_ids[code]), self.steps[code])
            for code, votes in zip(
                self.answer_codes.tolist(), self.answer_votes.tolist(), strict=True
            )
        ]
        for image, (rollouts, unparsed, outside) in enumerate(self.counts.tolist()):
            own_candidates = slice(self.starts[image], self.starts[image + 1])
            own_answers = slice(self.answer_starts[image], self.answer_starts[image + 1])
            yield Votes(
                candidates[own_candidates], rollouts, unparsed, outside, answer_list[own_answers]
            )
