"""A prediction: the answer of `tasks.predict` about one image, with votes, reasoning and status."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """A policy's answer about one image.

    `answer` is the class name, "" for none, `class_id` its index in the list of classes, and `text`
    the answer as the policy wrote it. `confidence` is the share of samples that named the class, None
    in one_step. `candidates` are (name, votes), most votes first; `other_answers` are (text, votes)
    of answers that name no class. `options` are those of the second step, and `letter` its choice,
    "" where the first step sufficed. `reasoning` is the thought before the answer. `status` is how
    the answer was read, or why there is none; `error` is why the image was not asked about, "" if it
    was. `cut` counts the answers that ended at max_new_tokens.
    """

    image: str
    answer: str = ""
    class_id: int | None = None
    text: str = ""
    confidence: float | None = None
    status: str = ""
    candidates: list[tuple[str, int]] = field(default_factory=list)
    num_rollouts: int = 0
    num_unparsed: int = 0
    other_answers: list[tuple[str, int]] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    letter: str = ""
    reasoning: str = ""
    completion: str = ""
    cut: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {
            **asdict(self),
            "candidates": [{"name": name, "votes": votes} for name, votes in self.candidates],
            "other_answers": [{"text": text, "votes": n} for text, n in self.other_answers],
        }
