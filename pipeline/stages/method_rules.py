"""What a method needs of [Train] and [BuildMCQ], set or checked before a stage runs."""

from dataclasses import replace
from typing import Any

import data_cards
from pipeline.methods import method_of
from pipeline.scopes import section_of
from tasks.questions.settings import ANSWERED, BuildMCQSettings
from tasks.runtime.errors import StageError
from tasks.runtime.settings import rules
from training.rewards import graded_reward
from training.round_rules import check_batches, check_division, check_questions
from training.settings import TrainSettings

IMAGES = ("unlabelled_groups", "unlabelled_part")  # settings of [BuildMCQ] for such methods alone
LABELLED = (*ANSWERED, "think_length")  # the rewards that go by labels
READING = ("vocabulary", "fuzzy_threshold", "fuzzy_margin")  # settings of [BuildMCQ]
BEST = "keep_policy = best goes by labelled val images; set it to last"


def training(train: Any, settings: TrainSettings) -> TrainSettings:
    """[Train] for the method of a Train stage.

    Without labels, neither rewards nor val images may tell one. With majority votes, val images may not
    choose the policy. In pairs, advantages are scaled by batch unless `trl` says otherwise. Raises
    SettingsError where the settings do not go with the method.
    """
    kind, rewards = method_of(train.method), settings.rewards
    majority = any(built.settings.answer_from == "majority" for built in train.questions())
    problem = why = ""
    if majority and kind.questions == "mcq" and settings.keep_policy == "best":
        problem, why = BEST, "takes the majority vote for the label"
    elif kind.supervised:
        why = "is supervised"
        if section_of("Train", "rewards", train.param_kwargs) == f"Train:{train.method}":
            problem = "rewards: nothing is rewarded in this method; leave the key out"
    elif kind.unlabelled:
        why = "trains without labels"
        known = [name for name in rewards if name in LABELLED and name != "letter"]
        if known:
            problem = f"rewards: {known[0]} needs labels; leave it out"
        elif settings.keep_policy == "best":
            problem = BEST
        elif not {"letter", "frequency"} & rewards.keys() and not any(":" in r for r in rewards):
            problem = "rewards: nothing pays for the name; add letter, whose place frequency takes"
        settings = replace(settings, watch_every=0, keep_policy="last")
    elif kind.pairs:
        why = "asks pairs of questions"
        if not {"letter", "contrast"} & rewards.keys():
            problem = "rewards: pairs are paid in the place of letter; add it"
        elif settings.trl.get("multi_objective_aggregation") != "normalize_then_sum":
            settings = replace(settings, trl={"scale_rewards": "batch", **settings.trl})
    if problem:
        raise train.refusal(f"[Train] {problem} (the method {train.method} {why})")
    return settings


def checked(train: Any, settings: TrainSettings) -> TrainSettings:
    """The settings that a Train stage comes to, with its method's rewards.

    Raises SettingsError where they cannot train. How many processes a launcher starts is not known here:
    with one, Train checks the rest.
    """
    kind, style = method_of(train.method), train.engine().prompt_style
    try:
        settings.check_epochs(train.rounds)
        settings = replace(settings, rewards=kind.rewards(settings.rewards, style))
        if kind.supervised:
            return settings
        check_questions(settings, ask=kind.questions, pairs=kind.pairs, prompt_style=style)
        if train.launcher:
            batch = settings.questions_per_step * settings.num_generations
            check_division(batch, settings.micro_batch_size, 1)
        else:
            check_batches(settings, 1, kind.pairs)
        if "graded" in settings.rewards:
            for name in train.names:
                graded_reward(data_cards.load(name))
    except (StageError, data_cards.CardError) as error:
        raise train.refusal(error) from error
    return settings


def reading(train: Any) -> dict[str, Any]:
    """How the reward `frequency` of a Train stage reads answers, by card: as BuildMCQ does.

    Empty without that reward.
    """
    if "frequency" not in train.settings.rewards:
        return {}
    return {
        "reading": {
            built.set_name: {name: getattr(built.settings, name) for name in READING}
            for built in train.questions()
        }
    }


def of_round(train: Any) -> dict[str, Any]:
    """The inputs of a round that only some methods have: `pairs`, `reading` and `unlabelled`."""
    seen = [
        f"{built.settings.unlabelled_part} images of {' and '.join(built.settings.unlabelled)} classes of "
        f"{built.set_name}"
        for built in train.questions()
    ]
    kind = method_of(train.method)
    told = "; ".join(seen) if kind.unlabelled else ""
    return {"pairs": kind.pairs, "unlabelled": told, **reading(train)}


def images(method: str, settings: BuildMCQSettings) -> dict[str, str]:
    """Which images a method without labels sees: the settings IMAGES; empty for other methods."""
    if not method_of(method).unlabelled:
        return {}
    return {
        "unlabelled_groups": " ".join(settings.unlabelled),
        "unlabelled_part": settings.unlabelled_part,
    }


def check_votes(settings: BuildMCQSettings, propose: Any) -> None:
    """Raise SettingsError where proposals go by the labels that the questions go without."""
    if settings.answer_from == "majority" and propose.settings.counts:
        raise propose.refusal(
            f"[Propose] instalments = {propose.settings.instalments} stops where all answers name the "
            "label, and [BuildMCQ] answer_from = majority goes without labels; leave instalments empty, "
            f"for this method alone in a section [Propose:{propose.method}]"
        )


def check_images(build: Any, split: Any) -> None:
    """Raise SettingsError where a BuildMCQ stage cannot have the images that IMAGES ask for.

    With labels nothing reads IMAGES. Without, no image is of a novel class if the protocol knows none.
    """
    settings = build.settings
    if not method_of(build.method).unlabelled:
        own = rules(BuildMCQSettings)
        for name in IMAGES:
            if getattr(settings, name) != own[name][1].unset:
                raise build.refusal(
                    f"[BuildMCQ] {name} = {getattr(settings, name)} does nothing for the method "
                    f"{build.method}, which trains with the labels of base train images; set it in a section "
                    "of a method without labels, such as [BuildMCQ:ttrv]"
                )
    elif "novel" in settings.unlabelled and split.settings.protocol == "all":
        raise build.refusal(
            "[BuildMCQ] unlabelled_groups names novel classes, and with [Split] protocol = all every "
            "class is base; set unlabelled_groups = base"
        )


def check_split(build: Any, split: Any) -> None:
    """Raise SettingsError where a Split that has run lacks the images that are asked for."""
    if not method_of(build.method).unlabelled or not split.folder.is_dir():
        return
    from tasks.tables import split_table  # it imports pyarrow

    settings = build.settings
    try:
        split_table.unlabelled(split.folder, settings.unlabelled, settings.unlabelled_part)
    except StageError as error:
        raise build.refusal(error) from error
