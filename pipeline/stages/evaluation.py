"""The stages that look at a policy: Evaluate, on its own sets or others, and Judge."""

from functools import cached_property
from pathlib import Path
from typing import Any

import luigi

import data_cards
from pipeline.parameters import parameters
from pipeline.settings import SettingsError, run
from pipeline.stage import Stage
from pipeline.stages.data import data, paths
from pipeline.stages.rounds import Round, RoundOfSet, Train, graph, last_round
from tasks.evaluation.settings import EvaluateSettings, JudgeSettings


class OnAnySet(RoundOfSet):
    """A stage of a round that can also look at a set that the policy was not trained on."""

    on = luigi.Parameter(default="", description="the set to look at; empty: its own")

    @property
    def set_name(self) -> str:
        return self.on or super().set_name

    def parts(self):
        return [] if self.on else super().parts()

    def significant(self):
        """Without `on`: the set stands among the inputs."""
        return {name: value for name, value in super().significant().items() if name != "on"}

    def place(self):
        return self.beside(Round.place(self))

    def beside(self, place: str) -> str:
        """The folder of this set's artifacts below `place`, which is its own set's."""
        return place if self.set_name == self.dataset else f"{place}/{self.set_name}"


@parameters(EvaluateSettings)
class Evaluate(OnAnySet):
    """Any policy on base and novel test images: `zero_shot` is the base policy, a method the
    policy that its round `refresh_round` trained. `--on SET` is another set than it was trained
    on; `--policy FOLDER-or-hub-id` a published model in place of the graph's."""

    datasets = luigi.Parameter(significant=False, description="further sets to evaluate on")
    policy = luigi.Parameter(default="", description="a folder or hub id; empty: the graph's")

    module = "tasks.evaluate"
    code_version = 2
    has_model = True

    @cached_property
    def settings(self) -> EvaluateSettings:
        return self.read(EvaluateSettings)

    def significant(self):
        """The modes in one order; the policy stands in the identity, by what it is."""
        chosen = super().significant()
        del chosen["policy"]
        if not chosen["limit"]:  # no trial
            del chosen["limit"]
        return {**chosen, "modes": self.settings.chosen_modes}

    def needs(self):
        needed = data(self, self.set_name)
        if self.policy:
            return needed
        zero_shot = self.method == "zero_shot"
        return {**needed, "policy": super().policy() if zero_shot else Train(**graph(self))}

    def extra_identity(self):
        given = {"policy": _published(self.policy)["identity"]} if self.policy else {}
        return {**self.engine_identity(), **given}

    def place(self):
        if not self.policy:
            return super().place()
        return self.beside(f"{_published(self.policy)['name']}/evaluate")

    def arguments(self):
        given = {"policy": _published(self.policy)["place"]} if self.policy else {}
        return {
            "card": self.set_name,
            "engine": self.engine().values(),
            "seed": self.seed,
            **self.settings.values(),
            **paths(self),
            **given,
        }


@parameters(JudgeSettings)
class Judge(OnAnySet):
    """A language model's second opinion on the answers of an evaluation that matched no class."""

    module = "tasks.judge"

    @cached_property
    def settings(self) -> JudgeSettings:
        return self.read(JudgeSettings)

    def significant(self):
        return {name: value for name, value in super().significant().items() if name != "seed"}

    def needs(self):
        if not (self.settings.url and self.settings.model):
            raise SettingsError("luigi.cfg: [Judge] needs a url and a model to judge with")
        return {"evaluate": Evaluate(subset=self.subset, on=self.on, **graph(self))}

    def extra_identity(self):
        from tasks.judge import PROMPT_VERSION

        return {"prompt_version": PROMPT_VERSION}

    def arguments(self):
        own = {"card": self.set_name, "artifacts": str(Path(run().artifacts).resolve())}
        return {**own, **self.settings.values(), **paths(self)}


def cross_evaluations(stage: Any) -> dict[str, dict[str, Stage]]:
    """Set -> method -> its evaluation there, for the sets of [Evaluate] datasets not trained on.

    `stage` has a dataset, a method and a seed; the base policy is evaluated as `zero_shot`.
    """
    given = {"dataset": stage.dataset, "subset": "", "seed": stage.seed}
    first = Evaluate(method="zero_shot", refresh_round=0, **given)
    wanted = [name for name in first.datasets.split() if name not in first.names]
    for name in wanted:
        if not data_cards.exists(name):
            raise SettingsError(f"luigi.cfg: [Evaluate] datasets: there is no data card {name!r}")
    return {
        name: {
            method: Evaluate(method=method, refresh_round=last, on=name, **given)
            for method, last in _last_rounds(stage.method).items()
        }
        for name in wanted
    }


def judgements(stage: Any) -> dict[str, Stage]:
    """Method -> the judge's opinion of its evaluation, where [Judge] url names a judge."""
    given = {"dataset": stage.dataset, "subset": stage.subset, "seed": stage.seed}
    found = {
        method: Judge(method=method, refresh_round=last, **given)
        for method, last in _last_rounds(stage.method).items()
    }
    return found if found["zero_shot"].settings.url else {}


def _last_rounds(method: str) -> dict[str, int]:
    """The base policy and, if it is another, the method, each with the round that is evaluated."""
    return {"zero_shot": 0} | ({method: last_round(method)} if method != "zero_shot" else {})


def _published(policy: str) -> dict[str, str]:
    """What tells a policy that is not the graph's from others, its name, and where it lies."""
    from tasks.engines import policies

    try:
        told = policies.identity(policy)
    except policies.PolicyError as error:
        raise SettingsError(str(error)) from error
    return {"identity": told, "name": policies.name(policy), "place": policies.absolute(policy)}
