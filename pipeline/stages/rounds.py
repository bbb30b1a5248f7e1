"""The stages of a round: Propose, BuildMCQ and Train.

A round r > 0 starts from the policy that round r - 1 trained.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import luigi

from pipeline.methods import METHOD_HELP, SEED_HELP, method_of, num_rounds
from pipeline.parameters import parameter, parameters
from pipeline.settings import run
from pipeline.stage import OfSet, Stage
from pipeline.stages import method_rules
from pipeline.stages.data import BasePolicy, data, paths, snake, tell_of_trained_novel_classes
from pipeline.stages.engine import engine
from tasks.engines.settings import EngineSettings
from tasks.questions.settings import BuildMCQSettings, ProposeSettings
from tasks.runtime.settings import Rule
from training.settings import TrainSettings

# The settings that the result of a refresh depends on, by the kind of refresh.
OF_REFRESH = {"all": (), "unsolved": ("solved_at", "solved"), "sample": ("refresh_share",)}
# Settings of [Train] that only one reward reads, and that reward.
OF_REWARD = {
    "think_target": "think_length",
    "think_limit": "think_length",
    "entropy_weight": "frequency",
}


class Round(Stage):
    """The base class of a round's stages: its parameters, the policy it starts from, its folder."""

    method = luigi.Parameter(description=METHOD_HELP)
    refresh_round = parameter(int, Rule("the round, from 0", at_least=0))
    seed = luigi.IntParameter(description=SEED_HELP)

    def policy(self) -> Stage:
        """The policy at the start of this round."""
        method_of(self.method)  # raises SettingsError for an unknown method
        if self.refresh_round == 0:
            return BasePolicy(dataset=self.dataset, seed=self.seed)
        return Train(**graph(self, refresh_round=self.refresh_round - 1))

    def requires(self):
        """The inputs, and for a LoRA policy among them also the base model below its adapter."""
        inputs = super().requires()
        lora = [stage for stage in inputs if isinstance(stage, Train) and stage.settings.lora_rank]
        return inputs + [stage.base() for stage in lora]

    def place(self):
        # Before any training all methods share one artifact of proposals.
        method = (
            "" if self.refresh_round == 0 and self.task_family == "Propose" else f"{self.method}/"
        )
        return f"{method}round{self.refresh_round}/{snake(self.task_family)}"

    def engine(self) -> EngineSettings:
        """[engine] with this method's prompt style, except for the proposals of round 0."""
        settings, style = engine().settings, method_of(self.method).prompt_style
        untrained = self.refresh_round == 0 and self.task_family == "Propose"
        return replace(settings, prompt_style=style) if style and not untrained else settings

    def engine_identity(self) -> dict[str, Any]:
        """The engine's settings that can change a result."""
        style = {"engine.prompt_style": self.engine().prompt_style}
        return {**engine().significant(), **style}


class RoundOfSet(Round, OfSet):
    """A stage of a round that works on one set."""

    def place(self):
        return "/".join(filter(None, (super().place(), self.subset)))


@parameters(ProposeSettings)
class Propose(RoundOfSet):
    """Samples N raw rollouts per training image from the policy at the start of the round."""

    code_version = 2
    module = "tasks.propose"
    has_model = True

    @cached_property
    def settings(self) -> ProposeSettings:
        """[Propose]; round 0 asks about all images."""
        settings = self.read(ProposeSettings)
        return replace(settings, refresh="all") if self.refresh_round == 0 else settings

    def significant(self):
        """The settings, of those about the refresh only the ones that its kind depends on."""
        significant, kind = super().significant(), self.settings.refresh
        used = OF_REFRESH[kind]
        if not self.settings.counts:
            del significant["instalments"]
        for name in ("refresh", "refresh_share", "solved_at", "solved"):
            if name not in used:
                del significant[name]
        return significant if kind == "all" else {**significant, "refreshed": kind}

    def needs(self):
        needed = {**data(self, self.set_name), "policy": self.policy()}
        if self.settings.refresh != "all":
            before = graph(self, refresh_round=self.refresh_round - 1)
            needed |= {"previous": self.clone(**before), "train": Train(**before)}
        return needed

    def extra_identity(self):
        return {**self.engine_identity(), "refresh_round": self.refresh_round}

    def arguments(self):
        own = {"card": self.set_name, "engine": self.engine().values()}
        own["seed"] = 1000 * self.seed + self.refresh_round
        return {**own, **self.settings.values(), **paths(self)}


@parameters(BuildMCQSettings)
class BuildMCQ(RoundOfSet):
    """Merges rollouts into candidates, and writes multiple-choice questions to frozen shards."""

    code_version = 2

    @cached_property
    def settings(self) -> BuildMCQSettings:
        """[BuildMCQ], with the wrong options and the truth of this method."""
        method, settings = method_of(self.method), self.read(BuildMCQSettings)
        return replace(
            settings,
            options_from=method.options_from or settings.options_from,
            answer_from=method.answer_from or settings.answer_from,
        )

    @property
    def asks_openly(self) -> bool:
        """Whether the method trains on the open question, which needs no proposals."""
        return method_of(self.method).questions == "open"

    @property
    def module(self):  # type: ignore[override]
        return "tasks.build_open" if self.asks_openly else "tasks.build_mcq"

    def significant(self):
        significant, settings = super().significant(), self.settings
        if self.asks_openly:
            own = {"prompt": self._prompt(), **{k: significant[k] for k in ("shard_size", "seed")}}
            return {**own, **method_rules.images(self.method, settings)}
        kept = {k: value for k, value in significant.items() if k not in method_rules.IMAGES}
        return kept | {name: getattr(settings, name) for name in ("options_from", "answer_from")}

    def needs(self):
        needed = data(self, self.set_name)
        method_rules.check_images(self, needed["split"])
        if self.asks_openly:
            return needed
        propose = Propose(subset=self.subset, **graph(self))
        method_rules.check_votes(self.settings, propose)
        return {**needed, "propose": propose}

    def requires(self):
        """The inputs; Luigi asks for them before any stage runs, so a Split that is there is read now."""
        if not self.parts():
            method_rules.check_split(self, self.needed["split"])
        return super().requires()

    def extra_identity(self):
        return {"method": self.method, "prompt_style": self.engine().prompt_style}

    def arguments(self):
        own = {"card": self.set_name, "seed": self.seed}
        own["prompt_style"] = self.engine().prompt_style
        if self.asks_openly:
            rest = {"prompt": self._prompt(), "shard_size": self.settings.shard_size}
            rest |= method_rules.images(self.method, self.settings)
            return {**own, **rest, **paths(self)}
        return {**own, **self.settings.values(), **paths(self)}

    def _prompt(self) -> str:
        return Propose(subset=self.subset, **graph(self)).settings.prompt


@parameters(TrainSettings)
class Train(Round):
    """Trains the policy on the frozen questions, with GRPO or the supervised baseline."""

    launcher = parameter(
        str, Rule("accelerate launch ... or torchrun ...; empty: one process", significant=False)
    )

    code_version = 2
    has_model = True

    @property
    def module(self):  # type: ignore[override]
        """GRPO, or the supervised baseline."""
        return "training.sft_baseline" if method_of(self.method).supervised else "training.grpo"

    @cached_property
    def settings(self) -> TrainSettings:
        """[Train] with this method's rewards, and the steps of all rounds if it trains in one."""
        settings, method = self.read(TrainSettings), method_of(self.method)
        settings = method_rules.training(self, settings)
        times = 1 if method.refreshes else run().rounds
        steps, epochs = settings.steps * times, settings.epochs * times
        return method_rules.checked(self, replace(settings, steps=steps, epochs=epochs))

    def significant(self):
        """The settings that are used, and the number of rounds where schedule or order depend on it."""
        settings, significant = self.settings, super().significant()
        for name, reward in OF_REWARD.items():
            if reward not in settings.rewards:
                significant.pop(name, None)
        for name in ("steps", "rewards", "watch_every", "trl"):  # those that a method changes
            significant[name] = getattr(settings, name)
        if method_of(self.method).unlabelled:
            del significant["watch_images"]
        if settings.epochs:
            significant["epochs"] = settings.epochs
        if settings.plans_ahead:
            significant["rounds"] = self.rounds if settings.carry_over else 1
        return significant

    @property
    def rounds(self) -> int:
        """The number of rounds in which its method trains."""
        return num_rounds(self.method, run().rounds)

    def requires(self):
        """The inputs; Luigi asks for them before any stage runs, so here both cards of a mix are known."""
        if len(self.names) > 1:
            splits = [data(self, name)["split"] for name in self.names]
            tell_of_trained_novel_classes(
                tuple((split.dataset, split.settings.protocol) for split in splits)
            )
        return super().requires()

    def questions(self) -> list[BuildMCQ]:
        """The stages whose questions it is trained on: one a set."""
        mixed = len(self.names) > 1
        return [BuildMCQ(subset=name if mixed else "", **graph(self)) for name in self.names]

    def needs(self):
        needed: dict[str, Stage] = {f"mcq/{built.set_name}": built for built in self.questions()}
        if self.settings.watch_every:
            for name in self.names:
                needed |= {f"{key}/{name}": stage for key, stage in data(self, name).items()}
        return {**needed, "policy": self.policy(), "base": self.base()}

    def extra_identity(self):
        return {
            "method": self.method,
            "refresh_round": self.refresh_round,
            "prompt_style": self.engine().prompt_style,
            **method_rules.reading(self),
        }

    def arguments(self):
        method, needed = method_of(self.method), self.needs()

        def folders(kind: str) -> list[str]:
            return [str(s.folder) for key, s in needed.items() if key.startswith(f"{kind}/")]

        return {
            "card": "+".join(self.names),
            "method": self.method,
            "ask": method.questions,
            "truth_rollout": method.truth_rollout,
            **method_rules.of_round(self),
            **{kind: folders(kind) for kind in ("mcq", "download", "split")},
            "base": str(self.base().folder),
            "policy": str(self.policy().folder),
            "prompt_style": self.engine().prompt_style,
            "refresh_round": self.refresh_round,
            "rounds": self.rounds,
            "seed": self.seed,
            **self.settings.values(),
        }

    def base(self) -> Stage:
        """The policy that all rounds start from."""
        return BasePolicy(dataset=self.dataset, seed=self.seed)


def graph(stage: Any, **changed: Any) -> dict[str, Any]:
    """A stage's graph parameters, to pass on to another stage, with some of them changed."""
    names = ("dataset", "method", "refresh_round", "seed")
    return {**{name: getattr(stage, name) for name in names}, **changed}


def last_round(method: str) -> int:
    """The last round of a method."""
    return num_rounds(method, run().rounds) - 1
