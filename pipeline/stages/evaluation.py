"""The stages that evaluate a policy, on its own sets or others: Evaluate and Judge."""

from functools import cached_property
from pathlib import Path
from typing import Any

import luigi

import data_cards
from pipeline.parameters import parameter, parameters
from pipeline.settings import SettingsError, run
from pipeline.stage import Stage
from pipeline.stages.data import data, paths
from pipeline.stages.engine import engine
from pipeline.stages.rounds import Round, RoundOfSet, Train, graph, last_round
from tasks.evaluation.settings import EvaluateSettings, JudgeSettings
from tasks.runtime.protocol import ZERO_SHOT
from tasks.runtime.settings import Rule


class OnAnySet(RoundOfSet):
    """A stage of a round that can also work on a set that the policy was not trained on."""

    on = luigi.Parameter(default="", description="the set to look at; empty: its own")

    @property
    def set_name(self) -> str:
        return self.on or super().set_name

    def parts(self):
        return [] if self.on else super().parts()

    def significant(self):
        """The settings without `on`, since the inputs already tell the set."""
        return {name: value for name, value in super().significant().items() if name != "on"}

    def place(self):
        return self.beside(Round.place(self))

    def beside(self, place: str) -> str:
        """The folder of this set's artifacts: `place`, or a subfolder for another set."""
        return place if self.set_name == self.dataset else f"{place}/{self.set_name}"


@parameters(EvaluateSettings)
class Evaluate(OnAnySet):
    """Evaluates a policy on base and novel test images.

    The method `zero_shot` is the base policy; any other method is the policy that its round
    `refresh_round` trained. `--on SET` evaluates on another set than it was trained on, and
    `--policy FOLDER-or-hub-id` evaluates a published model in place of the graph's.
    """

    datasets = parameter(str, Rule("further sets to evaluate on", significant=False))
    policy = luigi.Parameter(default="", description="a folder or hub id; empty: the graph's")

    module = "tasks.evaluate"
    code_version = 2
    has_model = True

    @cached_property
    def settings(self) -> EvaluateSettings:
        return self.read(EvaluateSettings)

    def significant(self):
        """The settings with the modes in a fixed order; extra_identity() identifies the policy."""
        significant = super().significant()
        del significant["policy"]
        if "adaptive" not in self.settings.mode_names:
            del significant["instalments"]
        return {**significant, "modes": self.settings.mode_names}

    def needs(self):
        needed = data(self, self.set_name)
        if self.policy:
            return needed
        untrained = self.method == ZERO_SHOT
        return {**needed, "policy": super().policy() if untrained else Train(**graph(self))}

    def extra_identity(self):
        published = {"policy": _published(self.policy)["identity"]} if self.policy else {}
        # Greedy answers once had the penalty of samples.
        penalised = engine().settings.repetition_penalty != 1.0
        greedy = {"greedy_repetition_penalty": 1.0} if penalised else {}
        return {**self.engine_identity(), **published, **greedy}

    def place(self):
        if not self.policy:
            return super().place()
        return self.beside(f"{_published(self.policy)['name']}/evaluate")

    def arguments(self):
        published = {"policy": _published(self.policy)["place"]} if self.policy else {}
        return {
            "card": self.set_name,
            "engine": self.engine().values(),
            "seed": self.seed,
            **self.settings.values(),
            **paths(self),
            **published,
        }


@parameters(JudgeSettings)
class Judge(OnAnySet):
    """Asks a language model whether the free-text answers of an evaluation name the truth."""

    module = "tasks.judge"

    @cached_property
    def settings(self) -> JudgeSettings:
        return self.read(JudgeSettings)

    def significant(self):
        return {name: value for name, value in super().significant().items() if name != "seed"}

    def needs(self):
        if not (self.settings.url and self.settings.model):
            raise self.refusal("[Judge] url and model must both be set, to judge with")
        evaluate = Evaluate(subset=self.subset, on=self.on, **graph(self))
        if self.settings.answers == "samples" and evaluate.settings.mode_names == ["one_step"]:
            raise self.refusal(
                "[Judge] answers = samples needs samples: [Evaluate] modes must name more than "
                "one_step"
            )
        return {"evaluate": evaluate}

    def extra_identity(self):
        from tasks.judge import PROMPT_VERSION

        return {"prompt_version": PROMPT_VERSION}

    def arguments(self):
        own = {"card": self.set_name, "artifacts": str(Path(run().artifacts).resolve())}
        return {**own, **self.settings.values(), **paths(self)}


def cross_evaluations(stage: Any) -> dict[str, dict[str, Stage]]:
    """Set -> method -> evaluation, for the sets of [Evaluate] datasets that were not trained on.

    `stage` has a dataset, a method and a seed. The base policy is among the methods, as `zero_shot`.
    """
    of_run = {"dataset": stage.dataset, "subset": "", "seed": stage.seed}
    first = Evaluate(method=ZERO_SHOT, refresh_round=0, **of_run)
    wanted = [name for name in first.datasets.split() if name not in first.names]
    for name in wanted:
        if not data_cards.exists(name):
            raise first.refusal(f"[Evaluate] datasets: there is no data card {name!r}")
    return {
        name: {
            method: Evaluate(method=method, refresh_round=last, on=name, **of_run)
            for method, last in _last_rounds(stage.method).items()
        }
        for name in wanted
    }


def judgements(stage: Any) -> dict[str, Stage]:
    """Method -> the Judge of its evaluation; empty when [Judge] url is empty."""
    of_run = {"dataset": stage.dataset, "subset": stage.subset, "seed": stage.seed}
    judges = {
        method: Judge(method=method, refresh_round=last, **of_run)
        for method, last in _last_rounds(stage.method).items()
    }
    return judges if judges[ZERO_SHOT].settings.url else {}


def _last_rounds(method: str) -> dict[str, int]:
    """The round that is evaluated, by method: of the base policy, and of `method` if it is another."""
    return {ZERO_SHOT: 0} | ({method: last_round(method)} if method != ZERO_SHOT else {})


def _published(policy: str) -> dict[str, str]:
    """Identity, name and path (or hub id) of a policy that is not the graph's."""
    from tasks.engines import policies
    from tasks.runtime.errors import StageError

    try:
        identity = policies.identity(policy)
    except StageError as error:
        raise SettingsError(str(error)) from error
    return {"identity": identity, "name": policies.name(policy), "place": policies.absolute(policy)}
