"""Supervised examples: what the base policy is taught to say, built by pure functions.

Every completion names what it sees before it answers, also where the answer is a letter. The
letter is then a look-up of the name among the option lines, and a reward on the letter reaches
the words in which the policy names what it sees: the same words it uses for the open question.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tasks import prompts


@dataclass(frozen=True)
class Example:
    """One prompt and the completion to learn. `image` indexes the caller's images."""

    image: int
    question: str
    completion: str


def thought(name: str) -> str:
    """The reasoning of a completion: one sentence that names what the image shows."""
    return f"It looks like {name}."


def open_example(
    image: int, name: str, *, noun: str, kind: str, style: str, names: Sequence[str] | None = None
) -> Example:
    """The open question, answered with the name; `names` gives the closed-list form."""
    question = prompts.open_question(noun, kind, style=style, names=names)
    return Example(image, question, prompts.completion(thought(name), name))


def mcq_example(
    image: int, name: str, distractors: Sequence[str], rng: random.Random, *, noun: str, kind: str, style: str
) -> Example:
    """A multiple-choice question over `name` and `distractors`, in random order of letters."""
    options = [name, *distractors]
    rng.shuffle(options)
    question = prompts.mcq_question(noun, kind, options, style=style)
    letter = prompts.LETTERS[options.index(name)]
    return Example(image, question, prompts.completion(thought(name), letter))


def draw_example(
    image: int,
    name: str,
    others: Sequence[str],
    rng: random.Random,
    *,
    question_share: float,
    noun: str,
    kind: str,
    style: str,
    max_options: int = 5,
) -> Example:
    """One random example of an image: a multiple-choice question with chance `question_share`.

    `others` are the names that may stand beside the true one; a question takes 1 to
    `max_options` - 1 of them.
    """
    if rng.random() >= question_share:
        return open_example(image, name, noun=noun, kind=kind, style=style)
    count = min(len(others), rng.randint(1, max_options - 1))
    distractors = rng.sample(list(others), count)
    return mcq_example(image, name, distractors, rng, noun=noun, kind=kind, style=style)
