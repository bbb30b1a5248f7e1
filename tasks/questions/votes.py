"""The merged votes of an image: its candidates and its distinct answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Candidate(NamedTuple):
    """A class that some of an image's rollouts name; `logprob` is the mean over its votes, in nats.

    An open name, one that is no class (`vocabulary = open`), has class id -1, and `name` is its most
    frequent spelling. For a class `name` is "".
    """

    class_id: int
    votes: int
    logprob: float
    name: str = ""


class Answer(NamedTuple):
    """A distinct answer among an image's rollouts.

    `text` is "" if unreadable, `class_id` -1 if it names no class. `step` is the matching step of
    `tasks.language.class_names` or the parser problem of `tasks.language.answers`.
    """

    text: str
    votes: int
    class_id: int
    step: str


@dataclass
class Votes:
    """One image's merged rollouts: candidates and distinct answers, both by falling votes.

    `num_unparsed` counts unreadable answers, `num_outside` those that may not be candidates.
    """

    candidates: list[Candidate]
    num_rollouts: int
    num_unparsed: int
    num_outside: int
    answers: list[Answer]


@dataclass(frozen=True)
class Merged:
    """The merged votes of the images `start` to `stop`, as columns.

    `counts` has the shape (images, 3): rollouts, unparsed, outside. Image i has the candidates
    `starts[i]:starts[i + 1]` and the answers `answer_starts[i]:answer_starts[i + 1]`.
    """

    start: int
    stop: int
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    class_ids: NDArray[np.int32]
    votes: NDArray[np.int32]
    logprobs: NDArray[np.float64]
    names: dict[int, str]  # index of an open candidate -> its name
    answer_starts: NDArray[np.int64]
    answer_codes: NDArray[np.int32]  # into the lists below
    answer_votes: NDArray[np.int32]
    texts: list[str]
    steps: list[str]
    answer_class_ids: NDArray[np.int32]

    def candidates(self) -> list[Candidate]:
        """The candidates of all images in one list; `starts` delimits the images."""
        columns = (c.tolist() for c in (self.class_ids, self.votes, self.logprobs))
        candidates = list(starmap(Candidate, zip(*columns, strict=True)))
        for index, name in self.names.items():
            candidates[index] = candidates[index]._replace(name=name)
        return candidates

    def images(self) -> Iterator[Votes]:
        """The votes of each image."""
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
