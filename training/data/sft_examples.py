"""Supervised examples: what a policy is taught to say, built by pure functions.

Every completion names what it sees before it answers. A multiple-choice question is answered with
the option's name: the parser counts it like the letter, and a reward on it reaches the very words
that answer the open question. Looking up a name's letter is a skill of its own, which a model of
under two million parameters did not learn reliably within minutes; real models bring it along.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from tasks.language import prompts


class Example(NamedTuple):
    """One image (PIL), the question about it, and the completion to learn.

    `given` is the beginning of the completion that is shown and not taught. An `unfinished`
    completion does not end there: its end is not taught.
    """

    image: Any
    question: str
    completion: str
    given: str = ""
    unfinished: bool = False


class Wording(NamedTuple):
    """How questions are asked: `noun` and `kind` of the card, the prompt style."""

    noun: str
    kind: str
    style: str


def thought(name: str) -> str:
    """The reasoning of a completion: one sentence that names what the image shows."""
    return f"It looks like {name}."


def open_example(image: Any, name: str, wording: Wording) -> Example:
    """The open question, answered with the name."""
    question = prompts.open_question(wording.noun, wording.kind, style=wording.style)
    return Example(image, question, prompts.completion(thought(name), name))


def mcq_example(image: Any, name: str, options: Sequence[str], wording: Wording) -> Example:
    """The multiple-choice question over `options`, in that order, answered with the true `name`."""
    question = prompts.mcq_question(wording.noun, wording.kind, options, style=wording.style)
    return Example(image, question, prompts.completion(thought(name), name))


def random_example(
    image: Any,
    name: str,
    names: Sequence[str],
    rng: random.Random,
    wording: Wording,
    *,
    question_share: float,
    blind_share: float = 0.0,
    max_options: int = 5,
) -> Example:
    """An example of an image; multiple-choice with chance `question_share`.

    The wrong options are drawn evenly from the other `names`; a question has 2 to `max_options`
    options in random order. With chance `blind_share` a question shows a grey image: then only the
    options tell what to say, which is how a model learns to keep to them.
    """
    others = [other for other in names if other != name]
    if not others or rng.random() >= question_share:
        return open_example(image, name, wording)
    count = rng.randint(1, min(max_options - 1, len(others)))
    options = [name, *rng.sample(others, count)]
    rng.shuffle(options)
    if rng.random() < blind_share:
        image = Image.new("RGB", image.size, (127, 127, 127))
    return mcq_example(image, name, options, wording)
