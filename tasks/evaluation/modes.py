"""The modes of Evaluate: the question that each asks about an image, and how its answer is read.

    one_step     the greedy answer to the open question
    majority     the most voted of the sampled candidates
    two_step     the top candidates as a multiple-choice question, answered greedily
    mcq          the same with the truth injected by BuildMCQ's own rule: how well the policy
                 discriminates when the truth is among the options
    constrained  the question of two_step, answered by a letter that structured output enforces
    adaptive     two_step with as many samples, and options, as an image needs
                 (`tasks/evaluation/adaptive.py`)

Only `mcq` needs labels, so `tasks.predict` uses the same functions for images without labels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_cards import Card
from tasks.engines.worker import Query
from tasks.language import answers, prompts
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.language.taxonomy import Taxonomy
from tasks.questions.candidates import Votes
from tasks.questions.options import Option, balanced_letters, choose_options, shuffle_options
from tasks.tables.seeding import row_generator

OF_QUESTIONS = (
    "two_step",
    "mcq",
    "constrained",
    "adaptive",
)  # the modes that ask a multiple-choice question

GROUP_ONLY = "group_only"  # status of an answer that names a genus, say, and no species


class Reading(NamedTuple):
    """One parsed answer.

    `class_id` is None when the answer names no class; `letter` is the chosen option, "" without one.
    """

    completion: str
    answer: str
    class_id: int | None
    status: str
    letter: str = ""


def proposed_options(votes: Votes, num_options: int, seed: int, image_id: str) -> list[Option]:
    """The top candidates of an image in random order: the options of two_step and constrained."""
    top = [Option(c.class_id, c.votes, "policy") for c in votes.candidates[:num_options]]
    return shuffle_options(top, row_generator(seed, image_id))


def injected_options(
    votes: dict[str, Votes], truths: dict[str, int], num_options: int, seed: int
) -> dict[str, list[Option]]:
    """The options of mcq by image id: top candidates and truth, each letter right equally often.

    An image whose only candidate is the truth has one option. An image without candidates has none.
    """
    by_image: dict[str, list[Option]] = {}
    for image_id, truth in truths.items():
        candidates = votes[image_id].candidates
        options, outcome = choose_options(
            candidates,
            truth,
            num_options=num_options,
            min_options=2,
            top_up="none",
            confusion=(),
            generator=None,
        )
        alone = [Option(c.class_id, c.votes, "policy") for c in candidates]
        by_image[image_id] = alone if outcome == "truth_only" else options
    asked = [image_id for image_id, options in by_image.items() if len(options) >= 2]
    letters = np.random.default_rng([seed, len(asked)])
    positions = balanced_letters([len(by_image[image_id]) for image_id in asked], letters)
    for image_id, position in zip(asked, positions, strict=True):
        generator = row_generator(seed + 1, image_id)
        options = by_image[image_id]
        by_image[image_id] = shuffle_options(options, generator, position, truths[image_id])
    return by_image


def choice_queries(
    options: dict[str, list[Option]], card: Card, style: str, *, constrained: bool = False
) -> list[Query]:
    """The questions of all images with two options or more."""
    return [
        Query(
            image_id,
            prompts.mcq_question(card.noun, card.kind, option_names(offered, card), style=style),
            choices=tuple(LETTERS[: len(offered)]) if constrained else (),
        )
        for image_id, offered in options.items()
        if len(offered) >= 2
    ]


def option_names(options: Iterable[Option], card: Card) -> list[str]:
    """The class names of the options, in the order of their letters."""
    return [card.classes[option.class_id] for option in options]


def letter_of(class_id: int | None, options: Sequence[Option]) -> str:
    """The letter of a class among the options; "" if it is not among them."""
    positions = [i for i, option in enumerate(options) if option.class_id == class_id]
    return LETTERS[positions[0]] if positions else ""


def vote_share(votes: Votes, class_id: int | None) -> float:
    """The share of an image's rollouts that named the class; 0 without a class."""
    count = next((c.votes for c in votes.candidates if c.class_id == class_id), 0)
    return count / max(1, votes.num_rollouts)


def read_open(completion: str, names: ClassNames, taxonomy: Taxonomy | None = None) -> Reading:
    """Read an answer to the open question.

    The status of an answer that names a group of the taxonomy, and no class, is GROUP_ONLY.
    """
    parsed = answers.parse(completion)
    if parsed.answer is None:
        return Reading(completion, "", None, parsed.problem)
    class_id, step = names.match(parsed.answer).class_id, names.match(parsed.answer).step
    if class_id is None and taxonomy and taxonomy.group(parsed.answer):
        step = GROUP_ONLY
    return Reading(completion, parsed.answer, class_id, step)


def read_majority(votes: Votes, card: Card) -> Reading:
    """Read the most voted candidate as the answer."""
    if not votes.candidates:
        return Reading("", "", None, "no_candidates")
    winner = votes.candidates[0]
    status = f"{winner.votes} of {votes.num_rollouts} votes"
    return Reading("", card.classes[winner.class_id], winner.class_id, status)


def read_choice(
    completion: str | None, options: Sequence[Option], card: Card, *, constrained: bool = False
) -> Reading:
    """Read an answer to a multiple-choice question. A single option is the answer by itself.

    `completion` is None where nothing was asked. With `constrained` it is a bare letter.
    """
    if not options:
        return Reading("", "", None, "no_candidates")
    if len(options) == 1:
        only = options[0].class_id
        return Reading("", card.classes[only], only, "single_candidate")
    assert completion is not None  # every question with two options or more was asked
    if constrained:
        answer = completion.strip()
        known = len(answer) == 1 and answer in LETTERS[: len(options)]
        choice = answers.Choice(LETTERS.index(answer), "letter") if known else None
        choice = choice or answers.Choice(None, "unknown" if answer else "no_answer")
    else:
        choice = answers.choose(completion, option_names(options, card))
        answer = answers.parse(completion).answer or ""
    if choice.index is None:
        return Reading(completion, answer, None, choice.status)
    class_id = options[choice.index].class_id
    return Reading(completion, answer, class_id, choice.status, LETTERS[choice.index])
