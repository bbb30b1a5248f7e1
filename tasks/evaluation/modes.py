"""The modes of Evaluate: what each asks about an image, and how its answer is read.

    one_step     the greedy answer to the open question
    majority     the most voted of the sampled candidates
    two_step     the top candidates as a multiple-choice question, answered greedily
    mcq          the same with the truth injected by BuildMCQ's own rule: how well a policy tells
                 apart once the truth is there
    constrained  the question of two_step, answered by a letter that structured output enforces

Nothing here knows a label, but for the truth that `mcq` injects, so `tasks.predict` answers about
images without any by the same functions.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from data_cards import Card
from tasks.engines.worker import Ask
from tasks.language import answers, prompts
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.questions.candidates import Votes
from tasks.questions.options import Option, balanced_letters, choose_options, shuffle_options
from tasks.tables.seeding import row_generator

OF_QUESTIONS = ("two_step", "mcq", "constrained")  # those that ask a multiple-choice question


class Reading(NamedTuple):
    """One answer as it was understood.

    `class_id` is None when it names no class; `letter` is the option chosen, "" without one.
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

    An image whose only candidate is the truth has one option, and one without candidates none.
    """
    chosen: dict[str, list[Option]] = {}
    for image_id, truth in truths.items():
        found = votes[image_id].candidates
        options, outcome = choose_options(
            found,
            truth,
            num_options=num_options,
            min_options=2,
            top_up="none",
            confusion=(),
            generator=None,
        )
        alone = [Option(c.class_id, c.votes, "policy") for c in found]
        chosen[image_id] = alone if outcome == "truth_only" else options
    asked = [image_id for image_id, options in chosen.items() if len(options) >= 2]
    letters = np.random.default_rng([seed, len(asked)])
    positions = balanced_letters([len(chosen[image_id]) for image_id in asked], letters)
    for image_id, position in zip(asked, positions, strict=True):
        generator = row_generator(seed + 1, image_id)
        chosen[image_id] = shuffle_options(chosen[image_id], generator, position, truths[image_id])
    return chosen


def choice_asks(
    options: dict[str, list[Option]], card: Card, style: str, *, constrained: bool = False
) -> list[Ask]:
    """The questions of all images with two options or more."""
    return [
        Ask(
            image_id,
            prompts.mcq_question(card.noun, card.kind, option_names(found, card), style=style),
            choices=tuple(LETTERS[: len(found)]) if constrained else (),
        )
        for image_id, found in options.items()
        if len(found) >= 2
    ]


def option_names(options: Iterable[Option], card: Card) -> list[str]:
    """What stands behind the letters."""
    return [card.classes[option.class_id] for option in options]


def letter_of(class_id: int | None, options: Sequence[Option]) -> str:
    """The letter of a class among the options; "" if it is not there."""
    found = [i for i, option in enumerate(options) if option.class_id == class_id]
    return LETTERS[found[0]] if found else ""


def vote_share(votes: Votes, class_id: int | None) -> float:
    """The share of an image's rollouts that named a class; 0 for none."""
    count = next((c.votes for c in votes.candidates if c.class_id == class_id), 0)
    return count / max(1, votes.num_rollouts)


def read_open(completion: str, names: ClassNames) -> Reading:
    """An answer to the open question."""
    parsed = answers.parse(completion)
    if parsed.answer is None:
        return Reading(completion, "", None, parsed.problem)
    match = names.match(parsed.answer)
    return Reading(completion, parsed.answer, match.class_id, match.step)


def read_majority(votes: Votes, card: Card) -> Reading:
    """The most voted candidate."""
    if not votes.candidates:
        return Reading("", "", None, "no_candidates")
    winner = votes.candidates[0]
    status = f"{winner.votes} of {votes.num_rollouts} votes"
    return Reading("", card.classes[winner.class_id], winner.class_id, status)


def read_choice(
    completion: str | None, options: Sequence[Option], card: Card, *, constrained: bool = False
) -> Reading:
    """An answer to a multiple-choice question; a question of one option answers itself.

    `completion` is None where nothing was asked. With `constrained` it is a bare letter.
    """
    if not options:
        return Reading("", "", None, "no_candidates")
    if len(options) == 1:
        only = options[0].class_id
        return Reading("", card.classes[only], only, "single_candidate")
    assert completion is not None  # every question with two options was asked
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
    chosen = options[choice.index].class_id
    return Reading(completion, answer, chosen, choice.status, LETTERS[choice.index])
