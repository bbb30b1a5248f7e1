"""Rewards by name: `[Train] rewards = {"format": 1.0, "my_rewards:polite": 0.5}`.

A name is one of REWARDS, or `module:function`: a function in the form that `training.rewards` describes,
from the working directory or an installed package. The names are checked before a model is loaded.
"""

import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_cards import Card
from tasks.language.class_names import ClassNames
from tasks.language.vocabulary import Vocabulary
from tasks.runtime.errors import StageError, first_line
from training import rewards as ours
from training.data.group_rewards import contrast_reward, frequency_reward
from training.rewards import Reward
from training.settings import LARGEST_REWARD, TrainSettings

OVERLONG_SHARE = 0.2  # the overlong reward falls to -1 over this last share of the longest length

PLAIN: dict[str, Reward] = {
    "format": ours.format_reward,
    "caption_format": ours.caption_format_reward,
    "direct_format": ours.direct_format_reward,
    "letter": ours.letter_reward,
    "difficulty_weighted": ours.difficulty_weighted_reward,
    "contrast": contrast_reward,
}
OF_CARD: dict[str, Callable[[Card], Reward]] = {
    "exact": lambda card: ours.exact_reward(ClassNames.of(card)),
    "virft_compat": lambda card: ours.virft_compat_reward(card.classes),
    "graded": ours.graded_reward,
}


def choose_rewards(
    settings: TrainSettings,
    cards: Sequence[Card],
    count_tokens: Callable[[str], int],
    reading: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Reward]:
    """The reward functions named in `[Train] rewards`, in their order, each under its name there.

    `count_tokens` counts the policy's tokens in a text. `reading` is for `frequency`: a card's name -> how
    its answers are read, with the keys vocabulary, fuzzy_threshold and fuzzy_margin of [BuildMCQ]. A card
    that is not there is read with a closed vocabulary. Raises StageError for a name of one's own that
    is no function of completions and columns.
    """
    return [
        named(
            name, _find(name, weight, settings, cards, count_tokens, reading or {}), ids=index == 0
        )
        for index, (name, weight) in enumerate(settings.rewards.items())
    ]


def named(name: str, reward: Reward, ids: bool) -> Reward:
    """The reward under the name `name`; with `ids` it also logs the questions' ids for the trainer."""

    @functools.wraps(reward)
    def rewarded(completions: Sequence[Any], **columns: Any) -> list[float]:
        if ids and "log_extra" in columns:
            for column in ("mcq_id", "image_id"):
                columns["log_extra"](column, list(columns[column]))
        return reward(completions, **columns)

    rewarded.__name__ = name
    return rewarded


def _find(
    name: str,
    weight: float,
    settings: TrainSettings,
    cards: Sequence[Card],
    count_tokens: Callable[[str], int],
    reading: Mapping[str, Mapping[str, Any]],
) -> Reward:
    if name in PLAIN:
        return PLAIN[name]
    if name in OF_CARD:
        return _by_card({card.name: OF_CARD[name](card) for card in cards})
    if name == "frequency":
        read = {card.name: Vocabulary.of(card, reading.get(card.name, {})) for card in cards}
        weight_of_entropy = settings.entropy_weight
        return _by_card({key: frequency_reward(v, weight_of_entropy) for key, v in read.items()})
    if name == "think_length":
        target, limit = settings.think_target, settings.think_limit
        of_cards = {c.name: ours.think_length_reward(c, count_tokens, target, limit) for c in cards}
        return _by_card(of_cards)
    if name == "overlong":
        longest = settings.max_completion_length
        return ours.overlong_reward(longest, max(1, round(OVERLONG_SHARE * longest)))
    return _guarded(name, _import(name), LARGEST_REWARD / max(1.0, abs(weight)))


def _by_card(by_name: dict[str, Reward]) -> Reward:
    """A reward that scores each completion by its own card's reward function."""

    def reward(completions: Sequence[Any], card: Sequence[str], **columns: Any) -> list[float]:
        paid = [0.0] * len(completions)
        for name, of_card in by_name.items():
            places = [place for place, owner in enumerate(card) if owner == name]
            own = {
                column: [columns[column][place] for place in places]
                for column in ("label", "options", "answer_letter", "mcq_id")
                if column in columns
            }
            values = of_card([completions[place] for place in places], **own)
            for place, value in zip(places, values, strict=True):
                paid[place] = value
        return paid

    return reward


def _import(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise StageError(
            f"[Train] rewards: {name!r} cannot be imported: {first_line(error)}"
        ) from error
    try:
        kinds = [p.kind for p in inspect.signature(reward).parameters.values()]
    except (TypeError, ValueError) as error:
        raise StageError(f"[Train] rewards: {name!r} is not a function") from error
    if inspect.iscoroutinefunction(reward):
        raise StageError(f"[Train] rewards: {name!r} is async; a plain function is needed")
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise StageError(
            f"[Train] rewards: {name!r} must accept completions and, by name, any column: "
            "def reward(completions, **columns) -> list[float]"
        )
    return reward


def _guarded(name: str, function: Callable[..., Any], largest: float) -> Reward:
    """A user's function, guarded: what fails is None for TRL, which leaves it out, and is printed once.

    A call that raises fails for all its completions. A value that is not finite, or larger than
    `largest`, fails for its own completion: one of them would make the whole group's gradient zero.
    """
    warned = False

    @functools.wraps(function)
    def reward(completions: Sequence[Any], **columns: Any) -> list[Any]:
        nonlocal warned
        try:
            returned = list(function(completions, **columns))
            paid = [None if value is None else _float(value) for value in returned]
            if len(paid) != len(completions):
                raise ValueError(f"{len(paid)} rewards for {len(completions)} completions")
            wrong = [value for value in paid if value is not None and not abs(value) <= largest]
            paid = [
                value if value is not None and abs(value) <= largest else None for value in paid
            ]
            what = f"gave {wrong[0]:g}, which cannot be summed" if wrong else ""
        except Exception as error:
            paid, wrong = [None] * len(completions), list(completions)
            what = f"failed ({type(error).__name__}: {first_line(error)})"
        if wrong:
            if not warned:
                print(
                    f"train: reward {name} {what}; such completions get none of it, and this is "
                    "not told again",
                    file=sys.stderr,
                )
            warned = True
            if "log_metric" in columns:
                columns["log_metric"](f"{name}/failed", len(wrong) / len(completions))
        return paid

    return reward


def _float(value: Any) -> float:
    """The value as a float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
