"""Builds supervised examples: an image, a question, and the completion to learn.

Every completion first names what the image shows, and then answers; in the prompt style `direct` it
answers alone. The answer to a multiple-choice
question is the option's name, which the parser counts like its letter. So a reward trains the same
words that answer the open question. Looking up a name's letter is a further skill, which a model of
under two million parameters did not learn reliably within minutes; real models have it.
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
    """The wording of questions: `noun` and `kind` of the card, and the prompt style."""

    noun: str
    kind: str
    style: str


def thought(name: str) -> str:
    """The reasoning of a completion: one sentence that names what the image shows."""
    return f"It looks like {name}."


def open_example(image: Any, name: str, wording: Wording) -> Example:
    """The open question, answered with the name."""
    question = prompts.open_question(wording.noun, wording.kind, style=wording.style)
    return Example(image, question, prompts.completion(thought(name), name, wording.style))


def mcq_example(image: Any, name: str, options: Sequence[str], wording: Wording) -> Example:
    """The multiple-choice question over `options`, in that order, answered with the true `name`."""
    question = prompts.mcq_question(wording.noun, wording.kind, options, style=wording.style)
    return Example(image, question, prompts.completion(thought(name), name, wording.style))


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
    """An example of an image: a multiple-choice one with probability `question_share`, else open.

    A multiple-choice question has 2 to `max_options` options in random order; the wrong ones are drawn
    evenly from the other `names`. With probability `blind_share` it shows a grey image: then only the
    options hint at the answer, so a model learns to answer with one of them.
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
