"""What a method needs of [Train] and [BuildMCQ], set or checked before a stage runs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.methods import method_of
from pipeline.settings import SettingsError
from tasks.questions.settings import ANSWERED, BuildMCQSettings, ProposeSettings
from tasks.runtime.errors import StageError
from training.settings import TrainSettings

IMAGES = ("unlabelled_groups", "unlabelled_part")  # settings of [BuildMCQ] for such methods alone
LABELLED = (*ANSWERED, "think_length")  # the rewards that go by labels
READING = ("vocabulary", "fuzzy_threshold", "fuzzy_margin")  # settings of [BuildMCQ]
BEST = "keep_policy = best goes by labelled val images; set it to last"


def training(settings: TrainSettings, method: str, questions: Sequence[Any]) -> TrainSettings:
    """[Train] for a method, whose BuildMCQ stages are `questions`.

    Without labels, neither rewards nor val images may tell one. With majority votes, val images may not
    choose the policy. In pairs, advantages are scaled by batch unless `trl` says otherwise. Raises
    SettingsError where the settings do not go with the method.
    """
    kind = method_of(method)
    majority = any(built.settings.answer_from == "majority" for built in questions)
    problem = why = ""
    if majority and kind.questions == "mcq" and settings.keep_policy == "best":
        problem, why = BEST, "takes the majority vote for the label"
    elif kind.questions == "open" and not kind.supervised and settings.order == "curriculum":
        problem, why = (
            "order = curriculum goes by candidates; set it to shuffled",
            "asks open questions",
        )
    elif kind.questions == "mcq" and "frequency" in settings.rewards:
        problem = "rewards: frequency counts the names of open answers; leave it out"
        why = "asks multiple-choice questions"
    elif "contrast" in settings.rewards and not kind.pairs:
        problem = "rewards: contrast is for the pairs of the method contrast; leave it out"
        why = "asks no pairs"
    elif kind.unlabelled:
        why = "trains without labels"
        known = [name for name in settings.rewards if name in LABELLED and name != "letter"]
        if known:
            problem = f"rewards: {known[0]} needs labels; leave it out"
        elif settings.keep_policy == "best":
            problem = BEST
        settings = replace(settings, watch_every=0, keep_policy="last")
    elif kind.pairs:
        why = "asks pairs of questions"
        trl = {"scale_rewards": "batch", **settings.trl}
        if trl["scale_rewards"] in ("group", True):
            problem = 'trl: "scale_rewards": "group" divides away what the pair adds; set "batch" or "none"'
        elif trl.get("multi_objective_aggregation") == "normalize_then_sum":
            problem = 'trl: "normalize_then_sum" divides away what the pair adds; leave it out'
        elif not {"letter", "contrast"} & settings.rewards.keys():
            problem = "rewards: pairs are paid in the place of letter; add it"
        elif settings.dynamic_sampling:
            problem = "dynamic_sampling would replace one question of a pair; set it to 0"
        elif settings.questions_per_step < 2:
            problem = "questions_per_step must be at least 2"
        else:
            settings = replace(settings, trl=trl)
    if problem:
        raise SettingsError(f"luigi.cfg: [Train] {problem} (the method {method} {why})")
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


def check_votes(method: str, settings: BuildMCQSettings, propose: ProposeSettings) -> None:
    """Raise SettingsError where proposals go by the labels that the questions go without."""
    if settings.answer_from == "majority" and propose.counts:
        raise SettingsError(
            f"luigi.cfg: [Propose] instalments = {propose.instalments} stops where all answers name the "
            "label, and [BuildMCQ] answer_from = majority goes without labels; leave instalments empty, "
            f"for this method alone in a section [Propose:{method}]"
        )


def check_protocol(method: str, split: Any, settings: BuildMCQSettings) -> None:
    """Raise SettingsError where images of novel classes are asked for and the protocol knows none."""
    if not method_of(method).unlabelled:
        return
    if "novel" in settings.unlabelled and split.settings.protocol == "all":
        raise SettingsError(
            "luigi.cfg: [BuildMCQ] unlabelled_groups names novel classes, and with [Split] protocol = all "
            "every class is base; set unlabelled_groups = base"
        )


def check_split(method: str, split: Any, settings: BuildMCQSettings) -> None:
    """Raise SettingsError where a Split that has run lacks the images that are asked for."""
    if not method_of(method).unlabelled or not split.folder.is_dir():
        return
    from tasks.tables import split_table  # it imports pyarrow

    try:
        split_table.unlabelled(split.folder, settings.unlabelled, settings.unlabelled_part)
    except StageError as error:
        raise SettingsError(f"luigi.cfg: {error}") from error
