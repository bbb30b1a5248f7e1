"""The reward that verl loads for exported questions: 1 for format, and 1 for the right answer.

    custom_reward_function.path=tasks/verl_reward.py custom_reward_function.name=compute_score

It is the reward of our own training, by the same parser. Rows come from `python -m tasks.exchange
export SHARDS --format verl`.
"""

from functools import lru_cache
from typing import Any

from data_cards import load
from tasks.language.answers import choose, in_form, parse
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **_: Any,
) -> float:
    """The reward of one completion, from 0 to 2, as verl's reward manager asks for it.

    `data_source` is the card's name, `ground_truth` the letter, or the name where the question is open.
    `extra_info` has the question's `options` in the order of their letters, and the `prompt_style` whose
    form is paid for.
    """
    extra = extra_info or {}
    options = [str(option) for option in extra["options"]]
    if len(options) > 1:
        right = choose(solution_str, options).index == LETTERS.index(ground_truth)
    else:
        names = _names(data_source)
        truth = names.match(ground_truth).class_id
        answer = parse(solution_str).answer
        right = answer is not None and names.match(answer).class_id == truth
    return float(in_form(solution_str, extra.get("prompt_style") or "brief")) + float(right)


@lru_cache
def _names(card: str) -> ClassNames:
    loaded = load(card)
    return ClassNames(loaded.classes, loaded.aliases)
