"""The whole line on one page: each task is parameters, what it needs, and one call.

    luigi --module pipeline.tasks TrainDiVE
    luigi --module pipeline.tasks BuildMCQ --refresh-round 1

Settings come from luigi.cfg, one section per task. `refresh_round` r > 0 proposes with the policy
that round r - 1 trained, so the graph is static and every round's shards stay on disk.
"""

import hashlib
from pathlib import Path
from typing import Any

import luigi

from pipeline import artifact
from pipeline.settings import Checked, SettingsError, run
from pipeline.stage import Stage, lineage, plain

METHODS = ("dive_k", "zero_shot")


class engine(Checked, luigi.Config):
    """[engine]: how text is generated, once for Propose and Evaluate alike."""

    prompt_style = luigi.Parameter(description="wording of all prompts: brief or stepwise")
    dtype = luigi.Parameter(description="auto, float32, bfloat16 or float16")
    temperature = luigi.FloatParameter()
    top_p = luigi.FloatParameter()
    repetition_penalty = luigi.FloatParameter()
    max_new_tokens = luigi.IntParameter()
    backend = luigi.Parameter(significant=False, description="vllm, transformers, module:function")
    max_model_len = luigi.IntParameter(significant=False)
    max_num_seqs = luigi.IntParameter(significant=False)
    gpu_memory_utilization = luigi.FloatParameter(significant=False)
    tensor_parallel_size = luigi.IntParameter(significant=False)
    cpu_kv_cache_gib = luigi.IntParameter(significant=False)

    def everything(self) -> dict[str, Any]:
        """All values, for the stage that opens an engine."""
        return {name: plain(getattr(self, name)) for name, _ in self.get_params()}

    def significant(self) -> dict[str, Any]:
        """The values that can change what a result means."""
        return {
            f"engine.{n}": plain(getattr(self, n)) for n, p in self.get_params() if p.significant
        }


class Download(Stage):
    """A data card's images, checked and decoded, into Parquet."""

    max_reject_share = luigi.FloatParameter(description="more unusable files than this is an error")
    archives = luigi.Parameter(
        significant=False, description="where official archives lie, or are downloaded to"
    )

    module = "tasks.download"
    reads_card = True

    def place(self):
        return "download"

    def arguments(self):
        archives = str(Path(self.archives).expanduser().resolve())
        return {"card": self.dataset, "archives": archives, **self.settings()}


class Split(Stage):
    """Which image is pretrain, train, val or test; which class is base or novel."""

    seed = luigi.IntParameter()
    protocol = luigi.Parameter()
    test_share = luigi.FloatParameter()
    val_share = luigi.FloatParameter()
    pretrain_share = luigi.FloatParameter()
    val_per_class = luigi.IntParameter(description="a count in place of val_share; 0: the share")
    split_file = luigi.Parameter(description="a split file of CoOp's to follow; empty: none")
    shots = luigi.IntParameter(description="train images a class keeps, CoOp's draw; 0: all")

    module = "tasks.split"
    reads_card = True

    def needs(self):
        return {"download": Download(dataset=self.dataset)}

    def extra_identity(self):
        path = Path(self.split_file).expanduser()
        return (
            {"split_file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            if path.is_file()
            else {}
        )

    def place(self):
        return "split"

    def arguments(self):
        return {"card": self.dataset, **self.settings(), **paths(self)}


class BasePolicy(Stage):
    """The policy that training starts from: the embedded miniature, a folder or a hub id."""

    seed = luigi.IntParameter()
    model = luigi.Parameter()
    min_pixels = luigi.IntParameter()
    max_pixels = luigi.IntParameter()
    steps = luigi.IntParameter()
    batch_size = luigi.IntParameter()
    learning_rate = luigi.FloatParameter(description="of AdamW")
    muon_learning_rate = luigi.FloatParameter(description="of Muon on hidden matrices; 0: none")
    question_share = luigi.FloatParameter(description="share of multiple-choice examples")
    blind_share = luigi.FloatParameter(description="share of those with a grey image")
    dtype = luigi.Parameter()

    module = "training.sft"

    def needs(self):
        return data(self)

    def extra_identity(self):
        return {"prompt_style": engine().prompt_style}

    def place(self):
        return "base_policy"

    def arguments(self):
        return {
            "card": self.dataset,
            "prompt_style": engine().prompt_style,
            **self.settings(),
            **paths(self),
        }


class Round(Stage):
    """What every stage of a round shares: its place in the chain, and the policy it starts from."""

    method = luigi.Parameter()
    refresh_round = luigi.IntParameter()
    seed = luigi.IntParameter()

    def policy(self) -> Stage:
        """The policy at the start of this round."""
        if self.method not in METHODS:
            raise SettingsError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.refresh_round == 0:
            return BasePolicy(dataset=self.dataset, seed=self.seed)
        return Train(**graph(self, refresh_round=self.refresh_round - 1))

    def place(self):
        # Before any training every method proposes alike, and shares the artifact.
        method = (
            "" if self.refresh_round == 0 and self.task_family == "Propose" else f"{self.method}/"
        )
        return f"{method}round{self.refresh_round}/{snake(self.task_family)}"


class Propose(Round):
    """N rollouts per training image from the round's policy, batched in vLLM, raw."""

    num_rollouts = luigi.IntParameter()
    prompt = luigi.Parameter(description="open or closed_list")
    shard_size = luigi.IntParameter(description="images a shard; the unit of resuming")
    max_unparsed_share = luigi.FloatParameter()

    module = "tasks.propose"

    def needs(self):
        return {**data(self), "policy": self.policy()}

    def extra_identity(self):
        return {**engine().significant(), "refresh_round": self.refresh_round}

    def arguments(self):
        settings = self.settings() | {"seed": 1000 * self.seed + self.refresh_round}
        return {"card": self.dataset, "engine": engine().everything(), **settings, **paths(self)}


class BuildMCQ(Round):
    """Rollouts to merged candidates to multiple-choice questions, in frozen shards."""

    num_options = luigi.IntParameter()
    min_options = luigi.IntParameter()
    top_up = luigi.Parameter(description="confusion, text, random or none")
    vocabulary = luigi.Parameter(description="closed or open")
    fuzzy_threshold = luigi.FloatParameter(description="similarity up to 100; 0: off")
    fuzzy_margin = luigi.FloatParameter()
    options_from = luigi.Parameter(description="policy, random, text or hard_negative")
    answer_from = luigi.Parameter(description="label or majority")
    min_truth_votes = luigi.IntParameter()
    max_unparsed_per_image = luigi.FloatParameter()
    max_lost_share = luigi.FloatParameter()
    shard_size = luigi.IntParameter(description="images a shard; letters are balanced in each")

    module = "tasks.build_mcq"
    code_version = 2

    def needs(self):
        return {**data(self), "propose": Propose(**graph(self))}

    def extra_identity(self):
        return {"method": self.method, "prompt_style": engine().prompt_style}

    def arguments(self):
        return {
            "card": self.dataset,
            "prompt_style": engine().prompt_style,
            **self.settings(),
            **paths(self),
        }


class Train(Round):
    """GRPO on the frozen shards only."""

    steps = luigi.IntParameter(description="optimiser steps in each round")
    questions_per_step = luigi.IntParameter()
    num_generations = luigi.IntParameter(description="completions per question, GRPO's group size")
    max_completion_length = luigi.IntParameter()
    learning_rate = luigi.FloatParameter()
    rewards = luigi.DictParameter(description="reward name -> weight")
    order = luigi.Parameter(description="shuffled, or curriculum: each epoch from easy to hard")
    freeze = luigi.Parameter(description="none, vision or language: the part that stays as it is")
    trl = luigi.DictParameter(description="any further option of TRL's GRPOConfig")
    dtype = luigi.Parameter()
    micro_batch_size = luigi.IntParameter(significant=False)
    save_steps = luigi.IntParameter(significant=False)

    module = "training.grpo"

    def needs(self):
        return {"mcq": BuildMCQ(**graph(self)), "policy": self.policy()}

    def extra_identity(self):
        return {
            "method": self.method,
            "refresh_round": self.refresh_round,
            "prompt_style": engine().prompt_style,
        }

    def arguments(self):
        return {
            "card": self.dataset,
            "prompt_style": engine().prompt_style,
            "refresh_round": self.refresh_round,
            "micro_batch_size": self.micro_batch_size,
            "save_steps": self.save_steps,
            **self.settings(),
            **paths(self),
        }


class Evaluate(Round):
    """Any policy on base and novel test images: `zero_shot` is the base policy, a method the
    policy that its round `refresh_round` trained."""

    part = luigi.Parameter(description="test, or val for tuning")
    num_rollouts = luigi.IntParameter()
    num_options = luigi.IntParameter()
    prompt = luigi.Parameter(description="open or closed_list")
    shard_size = luigi.IntParameter()

    module = "tasks.evaluate"

    def needs(self):
        zero_shot = self.method == "zero_shot"
        return {**data(self), "policy": self.policy() if zero_shot else Train(**graph(self))}

    def extra_identity(self):
        return engine().significant()

    def arguments(self):
        return {
            "card": self.dataset,
            "engine": engine().everything(),
            **self.settings(),
            **paths(self),
        }


class Report(Stage):
    """Numbers with intervals, and a page to look at."""

    method = luigi.Parameter()
    seed = luigi.IntParameter()

    module = "tasks.report"

    def needs(self):
        given = {"dataset": self.dataset, "seed": self.seed}
        needed: dict[str, Stage] = {
            "zero_shot": Evaluate(method="zero_shot", refresh_round=0, **given)
        }
        if self.method != "zero_shot":
            chain = {"method": self.method, **given}
            needed[self.method] = Evaluate(refresh_round=run().rounds - 1, **chain)
            for r in range(run().rounds):
                needed[f"train{r}"] = Train(refresh_round=r, **chain)
                needed[f"mcq{r}"] = BuildMCQ(refresh_round=r, **chain)
                needed[f"propose{r}"] = Propose(refresh_round=r, **chain)
        return {**needed, **data(self)}

    def place(self):
        return f"{self.method}/report"

    def arguments(self):
        need = self.needs()
        names = ["zero_shot"] if self.method == "zero_shot" else ["zero_shot", self.method]
        rounds = range(run().rounds) if self.method != "zero_shot" else ()
        return {
            "card": self.dataset,
            "evaluations": [{"name": name, "path": str(need[name].folder)} for name in names],
            "rounds": [
                {
                    "round": r,
                    "propose": str(need[f"propose{r}"].folder),
                    "build_mcq": str(need[f"mcq{r}"].folder),
                    "train": str(need[f"train{r}"].folder),
                }
                for r in rounds
            ],
            "download": str(need["download"].folder),
            "split": str(need["split"].folder),
            "manifests": [str(stage.folder / "manifest.json") for stage in lineage(self)],
        }


class TrainDiVE(Checked, luigi.Task):
    """Everything: all rounds of propose, build and train, the evaluations and the report."""

    dataset = luigi.Parameter()
    method = luigi.Parameter()
    seed = luigi.IntParameter()

    def requires(self):
        return Report(dataset=self.dataset, method=self.method, seed=self.seed)

    def complete(self):
        return self.requires().complete()

    def run(self):
        print(artifact.summary(self.requires().folder), flush=True)


def graph(stage: Any, **changed: Any) -> dict[str, Any]:
    """The parameters that travel along the graph, some of them changed."""
    names = ("dataset", "method", "refresh_round", "seed")
    return {**{name: getattr(stage, name) for name in names}, **changed}


def data(stage: Any) -> dict[str, Stage]:
    """The images and their places."""
    return {
        "download": Download(dataset=stage.dataset),
        "split": Split(dataset=stage.dataset, seed=stage.seed),
    }


def paths(stage: Stage) -> dict[str, str]:
    """The artifact folders a stage reads, by the names its function knows."""
    return {name: str(needed.folder) for name, needed in stage.needs().items()}


def snake(name: str) -> str:
    """BuildMCQ -> build_mcq."""
    return {"BuildMCQ": "build_mcq"}.get(name, name.lower())
