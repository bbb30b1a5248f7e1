"""The whole line on one page: each task is parameters, what it needs, and one call.

    luigi --module pipeline.tasks TrainDiVE
    luigi --module pipeline.tasks BuildMCQ --refresh-round 1
    luigi --module pipeline.tasks TrainDiVE --dataset cub+flowers

Settings come from luigi.cfg, one section per task. `refresh_round` r > 0 proposes with the policy
that round r - 1 trained, so the graph is static and every round's shards stay on disk. Of a mix of
sets each has its own images, questions and evaluation; BasePolicy and Train belong to the mix.
"""

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import luigi

import data_cards
from pipeline import artifact
from pipeline.settings import Checked, SettingsError, run
from pipeline.stage import OfSet, Stage, lineage, plain

METHODS = ("dive_k", "zero_shot")


class engine(Checked, luigi.Config):
    """[engine]: how text is generated, once for Propose and Evaluate alike."""

    prompt_style = luigi.Parameter(description="wording of all prompts: brief or stepwise")
    list_position = luigi.Parameter(description="of a closed list: in_question or before_image")
    dtype = luigi.Parameter(description="auto, float32, bfloat16 or float16")
    quantization = luigi.Parameter(description="vLLM's: fp8, awq, bitsandbytes, ...; empty: none")
    lora = luigi.Parameter(description="a LoRA adapter's folder on top of the policy; empty: none")
    temperature = luigi.FloatParameter()
    top_p = luigi.FloatParameter()
    repetition_penalty = luigi.FloatParameter()
    max_new_tokens = luigi.IntParameter()
    backend = luigi.Parameter(
        significant=False, description="vllm, server, ray, transformers or module:function"
    )
    processes = luigi.IntParameter(significant=False, description="engines; 0: one per device")
    max_model_len = luigi.IntParameter(significant=False)
    max_num_seqs = luigi.IntParameter(significant=False)
    max_num_batched_tokens = luigi.IntParameter(significant=False, description="0: vLLM's choice")
    gpu_memory_utilization = luigi.FloatParameter(significant=False)
    tensor_parallel_size = luigi.IntParameter(significant=False)
    cpu_kv_cache_gib = luigi.IntParameter(significant=False)
    server_url = luigi.Parameter(significant=False, description="an OpenAI-compatible endpoint")
    server_model = luigi.Parameter(significant=False, description="empty: the policy's folder")
    server_concurrency = luigi.IntParameter(significant=False, description="requests in flight")
    server_timeout = luigi.FloatParameter(significant=False, description="seconds for a request")
    server_seeds = luigi.BoolParameter(significant=False, description="send a seed with requests")
    ray_address = luigi.Parameter(significant=False, description="empty: a cluster on this machine")

    def everything(self) -> dict[str, Any]:
        """All values, for the stage that opens an engine."""
        if urlsplit(self.server_url).password:
            raise SettingsError(
                "luigi.cfg: [engine] server_url holds a password, which recipes would keep; give the "
                "key in the environment, as OPENAI_API_KEY"
            )
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
    mirror = luigi.BoolParameter(description="read the card's copy on the hub, not the archives")
    decode_threads = luigi.IntParameter(significant=False, description="threads; 0: one a core")

    code_version = 2

    module = "tasks.download"
    reads_card = True

    def parts(self):
        return of_each_set(self)

    def place(self):
        return "download"

    def arguments(self):
        archives = str(Path(self.archives).expanduser().resolve())
        return {
            "card": self.dataset,
            "archives": archives,
            "decode_threads": self.decode_threads,
            **self.settings(),
        }


class Split(Stage):
    """Which image is pretrain, train, val or test; which class is base or novel."""

    seed = luigi.IntParameter()
    protocol = luigi.Parameter()
    test_share = luigi.FloatParameter()
    val_share = luigi.FloatParameter()
    pretrain_share = luigi.FloatParameter()
    val_per_class = luigi.IntParameter(description="a count in place of val_share; 0: the share")
    split_file = luigi.Parameter(description="a split of CoOp's or DiVE-k's to follow; empty: none")
    shots = luigi.IntParameter(description="train images a class keeps, CoOp's draw; 0: all")
    train_caps = luigi.DictParameter(description="card, or * for all -> train images kept at most")
    near_duplicates = luigi.IntParameter(description="bits of 64 in which near pictures differ")

    code_version = 2
    module = "tasks.split"
    reads_card = True

    def parts(self):
        return of_each_set(self)

    def settings(self):
        """Of the caps, only this set's own: another set's is no reason to run again."""
        chosen = super().settings()
        caps = chosen.pop("train_caps")
        for name in set(caps) - {"*"}:
            if not data_cards.exists(name):
                raise SettingsError(
                    f"luigi.cfg: [Split] train_caps: there is no data card {name!r}"
                )
        return {**chosen, "max_train_images": int(caps.get(self.dataset, caps.get("*", 0)))}

    def needs(self):
        return {"download": Download(dataset=self.dataset)}

    def extra_identity(self):
        if not self.split_file:
            return {}
        from tasks.split_files import sources

        files = sources(Path(self.split_file).expanduser())
        contents = b"".join(path.read_bytes() for path in files)
        return {"split_file_sha256": hashlib.sha256(contents).hexdigest()}

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
    has_model = True

    def needs(self):
        return {
            f"{key}/{name}": stage for name in self.names for key, stage in data(self, name).items()
        }

    def extra_identity(self):
        return {"prompt_style": engine().prompt_style}

    def place(self):
        return "base_policy"

    def arguments(self):
        need = self.needs()
        return {
            "card": "+".join(self.names),
            "download": [str(need[f"download/{name}"].folder) for name in self.names],
            "split": [str(need[f"split/{name}"].folder) for name in self.names],
            "prompt_style": engine().prompt_style,
            **self.settings(),
        }


class Round(Stage):
    """What the stages of a round share: their place in the chain, and the policy they start from."""

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


class RoundOfSet(Round, OfSet):
    """A stage of a round that works on one set."""

    def place(self):
        return "/".join(filter(None, (super().place(), self.subset)))


class Propose(RoundOfSet):
    """N rollouts per training image from the round's policy, batched in vLLM, raw."""

    num_rollouts = luigi.IntParameter()
    prompt = luigi.Parameter(description="open or closed_list")
    shard_size = luigi.IntParameter(description="images a shard; the unit of resuming")
    max_unparsed_share = luigi.FloatParameter(description="more unreadable answers: an error")
    fail_fast_unparsed_share = luigi.FloatParameter(description="the same after two shards")
    max_lost_share = luigi.FloatParameter(description="more images the engine refuses: an error")
    limit = luigi.IntParameter(description="the first n images only, for a trial; 0: all")

    code_version = 2
    module = "tasks.propose"
    has_model = True

    def needs(self):
        return {**data(self, self.set_name), "policy": self.policy()}

    def extra_identity(self):
        return {**engine().significant(), "refresh_round": self.refresh_round}

    def arguments(self):
        settings = self.settings() | {"seed": 1000 * self.seed + self.refresh_round}
        return {"card": self.set_name, "engine": engine().everything(), **settings, **paths(self)}


class BuildMCQ(RoundOfSet):
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
        propose = Propose(subset=self.subset, **graph(self))
        return {**data(self, self.set_name), "propose": propose}

    def extra_identity(self):
        return {"method": self.method, "prompt_style": engine().prompt_style}

    def arguments(self):
        return {
            "card": self.set_name,
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
    has_model = True

    def needs(self):
        questions = {
            f"mcq/{name}": BuildMCQ(subset=name if len(self.names) > 1 else "", **graph(self))
            for name in self.names
        }
        return {**questions, "policy": self.policy()}

    def extra_identity(self):
        return {
            "method": self.method,
            "refresh_round": self.refresh_round,
            "prompt_style": engine().prompt_style,
        }

    def arguments(self):
        return {
            "card": "+".join(self.names),
            "mcq": [str(self.needs()[f"mcq/{name}"].folder) for name in self.names],
            "policy": str(self.policy().folder),
            "prompt_style": engine().prompt_style,
            "refresh_round": self.refresh_round,
            "micro_batch_size": self.micro_batch_size,
            "save_steps": self.save_steps,
            **self.settings(),
        }


class Evaluate(RoundOfSet):
    """Any policy on base and novel test images: `zero_shot` is the base policy, a method the
    policy that its round `refresh_round` trained."""

    part = luigi.Parameter(description="test, or val for tuning")
    num_rollouts = luigi.IntParameter()
    num_options = luigi.IntParameter()
    prompt = luigi.Parameter(description="open or closed_list")
    shard_size = luigi.IntParameter()

    module = "tasks.evaluate"
    has_model = True

    def needs(self):
        zero_shot = self.method == "zero_shot"
        policy = self.policy() if zero_shot else Train(**graph(self))
        return {**data(self, self.set_name), "policy": policy}

    def extra_identity(self):
        return engine().significant()

    def arguments(self):
        return {
            "card": self.set_name,
            "engine": engine().everything(),
            **self.settings(),
            **paths(self),
        }


class Report(OfSet):
    """Numbers with intervals, and a page to look at."""

    method = luigi.Parameter()
    seed = luigi.IntParameter()

    module = "tasks.report"

    def needs(self):
        given = {"dataset": self.dataset, "seed": self.seed}
        of_set = {"subset": self.subset, **given}
        needed: dict[str, Stage] = {
            "zero_shot": Evaluate(method="zero_shot", refresh_round=0, **of_set)
        }
        if self.method != "zero_shot":
            chain = {"method": self.method, **of_set}
            needed[self.method] = Evaluate(refresh_round=run().rounds - 1, **chain)
            for r in range(run().rounds):
                needed[f"train{r}"] = Train(refresh_round=r, method=self.method, **given)
                needed[f"mcq{r}"] = BuildMCQ(refresh_round=r, **chain)
                needed[f"propose{r}"] = Propose(refresh_round=r, **chain)
        return {**needed, **data(self, self.set_name)}

    def place(self):
        return "/".join(filter(None, (self.method, "report", self.subset)))

    def arguments(self):
        need = self.needs()
        names = ["zero_shot"] if self.method == "zero_shot" else ["zero_shot", self.method]
        rounds = range(run().rounds) if self.method != "zero_shot" else ()
        return {
            "card": self.set_name,
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
    """Everything: all rounds of propose, build and train, the evaluations and a report a set."""

    dataset = luigi.Parameter(description="a data card's name, or several joined by +")
    method = luigi.Parameter()
    seed = luigi.IntParameter()

    def requires(self):
        report = Report(dataset=self.dataset, subset="", method=self.method, seed=self.seed)
        return report.parts() or [report]

    def complete(self):
        return all(report.complete() for report in self.requires())

    def run(self):
        print(
            "\n\n".join(artifact.summary(report.folder) for report in self.requires()), flush=True
        )


def graph(stage: Any, **changed: Any) -> dict[str, Any]:
    """The parameters that travel along the graph, some of them changed."""
    names = ("dataset", "method", "refresh_round", "seed")
    return {**{name: getattr(stage, name) for name in names}, **changed}


def data(stage: Any, name: str) -> dict[str, Stage]:
    """The images of a set and their places."""
    return {
        "download": Download(dataset=name),
        "split": Split(dataset=name, seed=stage.seed),
    }


def of_each_set(stage: Stage) -> list[Stage]:
    """The same stage of every set, where its dataset is a mix."""
    return [stage.clone(dataset=name) for name in stage.names] if len(stage.names) > 1 else []


def paths(stage: Stage) -> dict[str, str]:
    """The artifact folders a stage reads, by the names its function knows."""
    return {name: str(needed.folder) for name, needed in stage.needs().items()}


def snake(name: str) -> str:
    """BuildMCQ -> build_mcq."""
    return {"BuildMCQ": "build_mcq"}.get(name, name.lower())
