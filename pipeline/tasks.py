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
from pipeline import artifact, methods
from pipeline.methods import method_of, num_rounds, with_style
from pipeline.settings import Checked, SettingsError, run
from pipeline.stage import OfSet, Stage, lineage, plain

METHODS = (*methods.METHODS, methods.ZERO_SHOT)
MODES = ("one_step", "majority", "two_step", "mcq", "constrained")  # of Evaluate
REFRESH = ("refresh", "refresh_share", "solved_at", "solved")  # keys of [Propose]


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
        method_of(self.method)  # an unknown one is an error here
        if self.refresh_round == 0:
            return BasePolicy(dataset=self.dataset, seed=self.seed)
        return Train(**graph(self, refresh_round=self.refresh_round - 1))

    def place(self):
        # Before any training every method proposes alike, and shares the artifact.
        method = (
            "" if self.refresh_round == 0 and self.task_family == "Propose" else f"{self.method}/"
        )
        return f"{method}round{self.refresh_round}/{snake(self.task_family)}"

    def engine(self) -> dict[str, Any]:
        """[engine] in the wording of this method; before any training all methods propose alike."""
        untrained = self.refresh_round == 0 and self.task_family == "Propose"
        everything = engine().everything()
        return everything if untrained else with_style(everything, self.method)

    def engine_identity(self) -> dict[str, Any]:
        """What of the engine can change what a result means."""
        style = {"engine.prompt_style": self.engine()["prompt_style"]}
        return {**engine().significant(), **style}


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
    refresh = luigi.Parameter(description="later rounds ask again about: all, unsolved, sample")
    refresh_share = luigi.FloatParameter(description="of the images, with refresh = sample")
    solved_at = luigi.FloatParameter(description="mean reward of its latest use: solved")
    solved = luigi.Parameter(description="with refresh = unsolved: keep, or retire those solved")

    code_version = 2
    module = "tasks.propose"
    has_model = True

    def settings(self):
        """Of what a refresh chooses, only what it depends on."""
        chosen = super().settings()
        refresh = {key: chosen.pop(key) for key in REFRESH}
        if self.refresh_round == 0 or self.refresh == "all":
            return chosen
        used = {"unsolved": ("solved_at", "solved"), "sample": ("refresh_share",)}
        return {
            **chosen,
            "refreshed": self.refresh,
            **{key: refresh[key] for key in used.get(self.refresh, ())},
        }

    def needs(self):
        needed = {**data(self, self.set_name), "policy": self.policy()}
        if self.refresh_round > 0 and self.refresh != "all":
            before = graph(self, refresh_round=self.refresh_round - 1)
            needed |= {"previous": self.clone(**before), "train": Train(**before)}
        return needed

    def extra_identity(self):
        return {**self.engine_identity(), "refresh_round": self.refresh_round}

    def arguments(self):
        settings = self.settings() | {"seed": 1000 * self.seed + self.refresh_round}
        return {"card": self.set_name, "engine": self.engine(), **settings, **paths(self)}


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

    code_version = 2

    @property
    def module(self):  # type: ignore[override]
        """Methods that train on the open question need no proposals to build it."""
        asks_openly = method_of(self.method).questions == "open"
        return "tasks.build_open" if asks_openly else "tasks.build_mcq"

    def settings(self):
        chosen = super().settings()
        if method_of(self.method).questions == "open":
            given = Propose(subset=self.subset, **graph(self))
            return {"prompt": given.prompt, **{k: chosen[k] for k in ("shard_size", "seed")}}
        return chosen | ({"options_from": kind} if (kind := self._options_from()) else {})

    def needs(self):
        needed = data(self, self.set_name)
        if method_of(self.method).questions == "open":
            return needed
        return {**needed, "propose": Propose(subset=self.subset, **graph(self))}

    def extra_identity(self):
        return {"method": self.method, "prompt_style": self.engine()["prompt_style"]}

    def arguments(self):
        return {
            "card": self.set_name,
            "prompt_style": self.engine()["prompt_style"],
            **self.settings(),
            **paths(self),
        }

    def _options_from(self) -> str:
        return method_of(self.method).options_from


class Train(Round):
    """GRPO on the frozen shards only."""

    steps = luigi.IntParameter(description="optimiser steps in each round")
    questions_per_step = luigi.IntParameter()
    num_generations = luigi.IntParameter(description="completions per question, GRPO's group size")
    max_completion_length = luigi.IntParameter()
    learning_rate = luigi.FloatParameter()
    rewards = luigi.DictParameter(description="reward name or module:function -> weight")
    order = luigi.Parameter(description="shuffled, or curriculum: each epoch from easy to hard")
    dynamic_sampling = luigi.IntParameter(
        description="how often groups without a gradient are replaced by further questions; 0: never"
    )
    freeze = luigi.Parameter(description="none, or parts that stay: vision, projector, language")
    lora_rank = luigi.IntParameter(description="of adapters; 0: all weights are trained")
    lora_alpha = luigi.FloatParameter()
    lora_dropout = luigi.FloatParameter()
    lora_targets = luigi.Parameter(description="parts with adapters: vision, projector, language")
    quantize = luigi.Parameter(description="of the weights below adapters: none, or nf4 on a GPU")
    carry_over = luigi.BoolParameter(
        parsing=luigi.BoolParameter.EXPLICIT_PARSING,
        description="rounds are one run: optimizer, schedule and step go on",
    )
    watch_every = luigi.IntParameter(description="steps between looks at val images; 0: never")
    watch_images = luigi.IntParameter(description="val images looked at")
    keep_policy = luigi.Parameter(description="last, or best by val images")
    trl = luigi.DictParameter(description="any further option of TRL's GRPOConfig")
    dtype = luigi.Parameter()
    shared_prefix = luigi.BoolParameter(
        parsing=luigi.BoolParameter.EXPLICIT_PARSING,
        significant=False,
        description="each group's image and prompt are computed once; the same up to rounding",
    )
    tokens_per_micro_batch = luigi.IntParameter(
        significant=False, description="with shared_prefix: tokens of one pass; 0: no bound"
    )
    check_shared_prefix = luigi.BoolParameter(
        parsing=luigi.BoolParameter.EXPLICIT_PARSING,
        significant=False,
        description="compare the first batch with TRL's own pass",
    )
    micro_batch_size = luigi.IntParameter(significant=False)
    save_steps = luigi.IntParameter(significant=False)
    keep_checkpoints = luigi.IntParameter(significant=False, description="complete ones kept")
    launcher = luigi.Parameter(
        significant=False, description="accelerate launch ... or torchrun ...; empty: one process"
    )
    check_memory = luigi.BoolParameter(
        parsing=luigi.BoolParameter.EXPLICIT_PARSING,
        significant=False,
        description="refuse to start what cannot fit",
    )
    report_to = luigi.Parameter(significant=False, description="tensorboard, wandb, ...; empty")
    push_to_hub = luigi.Parameter(
        significant=False, description="a repository for the policy, made private; empty: none"
    )

    code_version = 2
    has_model = True

    @property
    def module(self):  # type: ignore[override]
        """GRPO, or the supervised baseline."""
        return "training.sft_baseline" if method_of(self.method).supervised else "training.grpo"

    def settings(self):
        """Of rounds that are one run, also how many: a schedule is planned over all of them."""
        chosen = super().settings()
        method = method_of(self.method)
        rounds = num_rounds(self.method, run().rounds)
        if not method.refreshes:  # all rounds' steps in one
            chosen["steps"] *= run().rounds
        if chosen["trl"].get("lr_scheduler_type", "linear") != "constant" or _warms_up(chosen):
            chosen["rounds"] = rounds if self.carry_over else 1
        return chosen | {"rewards": method.rewards(chosen["rewards"])}

    def needs(self):
        needed: dict[str, Stage] = {
            f"mcq/{name}": BuildMCQ(subset=name if len(self.names) > 1 else "", **graph(self))
            for name in self.names
        }
        if self.watch_every:
            for name in self.names:
                needed |= {f"{key}/{name}": stage for key, stage in data(self, name).items()}
        return {**needed, "policy": self.policy(), "base": self._base()}

    def extra_identity(self):
        return {
            "method": self.method,
            "refresh_round": self.refresh_round,
            "prompt_style": self.engine()["prompt_style"],
        }

    def arguments(self):
        method, needed = method_of(self.method), self.needs()

        def folders(kind: str) -> list[str]:
            return [str(s.folder) for key, s in needed.items() if key.startswith(f"{kind}/")]

        significant = {n for n, p in self.get_params() if p.significant} | {"launcher"}
        rest = {n: plain(getattr(self, n)) for n, _ in self.get_params() if n not in significant}
        return {
            "card": "+".join(self.names),
            "method": self.method,
            "ask": method.questions,
            "truth_rollout": method.truth_rollout,
            **{kind: folders(kind) for kind in ("mcq", "download", "split")},
            "base": str(self._base().folder),
            "policy": str(self.policy().folder),
            "prompt_style": self.engine()["prompt_style"],
            "refresh_round": self.refresh_round,
            "rounds": num_rounds(self.method, run().rounds),
            **rest,
            **self.settings(),
        }

    def _base(self) -> Stage:
        return BasePolicy(dataset=self.dataset, seed=self.seed)


class OnAnySet(RoundOfSet):
    """A stage of a round that can also look at a set that the policy was not trained on."""

    on = luigi.Parameter(default="", description="the set to look at; empty: its own")

    @property
    def set_name(self) -> str:
        return self.on or super().set_name

    def parts(self):
        return [] if self.on else super().parts()

    def settings(self):
        """Without `on`: the set stands among the inputs."""
        return {name: value for name, value in super().settings().items() if name != "on"}

    def place(self):
        return self.beside(Round.place(self))

    def beside(self, place: str) -> str:
        """The folder of this set's artifacts below `place`, which is its own set's."""
        return place if self.set_name == self.dataset else f"{place}/{self.set_name}"


class Evaluate(OnAnySet):
    """Any policy on base and novel test images: `zero_shot` is the base policy, a method the
    policy that its round `refresh_round` trained. `--on SET` is another set than it was trained
    on; `--policy FOLDER-or-hub-id` a published model in place of the graph's."""

    part = luigi.Parameter(description="test, or val for tuning")
    modes = luigi.Parameter(description=f"some of: {' '.join(MODES)}")
    num_rollouts = luigi.IntParameter()
    num_options = luigi.IntParameter()
    prompt = luigi.Parameter(description="open or closed_list")
    shard_size = luigi.IntParameter()
    datasets = luigi.Parameter(significant=False, description="further sets to evaluate on")
    policy = luigi.Parameter(default="", description="a folder or hub id; empty: the graph's")

    module = "tasks.evaluate"
    code_version = 2
    has_model = True

    def settings(self):
        """The modes in one order; the policy stands in the identity, by what it is."""
        chosen = super().settings()
        del chosen["policy"]
        modes = chosen["modes"].split()
        if unknown := [mode for mode in modes if mode not in MODES]:
            raise SettingsError(
                f"luigi.cfg: [Evaluate] modes: {unknown[0]!r} is none of {', '.join(MODES)}"
            )
        return {**chosen, "modes": [mode for mode in MODES if mode in modes]}

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
            "engine": self.engine(),
            **self.settings(),
            **paths(self),
            **given,
        }


class Judge(OnAnySet):
    """A language model's second opinion on the answers of an evaluation that matched no class."""

    url = luigi.Parameter(significant=False, description="OpenAI-compatible; empty: no judge")
    model = luigi.Parameter()
    api_key_env = luigi.Parameter(significant=False, description="the variable that holds the key")
    max_tokens = luigi.IntParameter(description="of a verdict")
    concurrency = luigi.IntParameter(significant=False, description="requests in flight")
    timeout = luigi.FloatParameter(significant=False, description="seconds for a request")
    attempts = luigi.IntParameter(significant=False, description="of a request, with backoff")
    shard_size = luigi.IntParameter(significant=False, description="verdicts a shard")
    max_failed_share = luigi.FloatParameter(description="more pairs without a verdict: an error")

    module = "tasks.judge"

    def settings(self):
        return {name: value for name, value in super().settings().items() if name != "seed"}

    def needs(self):
        if not (self.url and self.model):
            raise SettingsError("luigi.cfg: [Judge] needs a url and a model to judge with")
        return {"evaluate": Evaluate(subset=self.subset, on=self.on, **graph(self))}

    def extra_identity(self):
        from tasks.judge import PROMPT_VERSION

        return {"prompt_version": PROMPT_VERSION}

    def arguments(self):
        own = ("url", "api_key_env", "concurrency", "timeout", "attempts", "shard_size")
        return {
            "card": self.set_name,
            "artifacts": str(Path(run().artifacts).resolve()),
            **{name: getattr(self, name) for name in own},
            **self.settings(),
            **paths(self),
        }


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
    return found if found["zero_shot"].url else {}


def _last_rounds(method: str) -> dict[str, int]:
    """The base policy and, if it is another, the method, each with the round that is evaluated."""
    return {"zero_shot": 0} | ({method: last_round(method)} if method != "zero_shot" else {})


def _published(policy: str) -> dict[str, str]:
    """What tells a policy that is not the graph's from others, its name, and where it lies."""
    from tasks import policies

    try:
        told = policies.identity(policy)
    except policies.PolicyError as error:
        raise SettingsError(str(error)) from error
    return {"identity": told, "name": policies.name(policy), "place": policies.absolute(policy)}


class Report(OfSet):
    """Numbers with intervals, and a page to look at."""

    method = luigi.Parameter()
    seed = luigi.IntParameter()

    module = "tasks.report"
    code_version = 2

    def needs(self):
        given = {"dataset": self.dataset, "seed": self.seed}
        of_set = {"subset": self.subset, **given}
        needed: dict[str, Stage] = {
            "zero_shot": Evaluate(method="zero_shot", refresh_round=0, **of_set)
        }
        if self.method != "zero_shot":
            chain = {"method": self.method, **of_set}
            needed[self.method] = Evaluate(refresh_round=last_round(self.method), **chain)
            for r in range(last_round(self.method) + 1):
                needed[f"train{r}"] = Train(refresh_round=r, method=self.method, **given)
                needed[f"mcq{r}"] = BuildMCQ(refresh_round=r, **chain)
                if method_of(self.method).refreshes:
                    needed[f"propose{r}"] = Propose(refresh_round=r, **chain)
        for name, by_method in cross_evaluations(self).items():
            needed |= {f"cross/{name}/{method}": stage for method, stage in by_method.items()}
        needed |= {f"judge/{method}": stage for method, stage in judgements(self).items()}
        return {**needed, **data(self, self.set_name)}

    def place(self):
        return "/".join(filter(None, (self.method, "report", self.subset)))

    def arguments(self):
        need = self.needs()
        names = ["zero_shot"] if self.method == "zero_shot" else ["zero_shot", self.method]
        rounds = range(last_round(self.method) + 1) if self.method != "zero_shot" else ()
        return {
            "card": self.set_name,
            "evaluations": [{"name": name, "path": str(need[name].folder)} for name in names],
            "rounds": [
                {
                    "round": r,
                    "propose": str(need[f"propose{r}"].folder) if f"propose{r}" in need else "",
                    "build_mcq": str(need[f"mcq{r}"].folder),
                    "train": str(need[f"train{r}"].folder),
                }
                for r in rounds
            ],
            "download": str(need["download"].folder),
            "split": str(need["split"].folder),
            "manifests": [str(stage.folder / "manifest.json") for stage in lineage(self)],
            "cross": [
                {
                    "trained_on": self.dataset,
                    "set": key.split("/")[1],
                    "method": key.split("/")[2],
                    "path": str(stage.folder),
                }
                for key, stage in need.items()
                if key.startswith("cross/")
            ],
            "judged": [
                {"name": key.split("/")[1], "path": str(stage.folder)}
                for key, stage in need.items()
                if key.startswith("judge/")
            ],
            "command": f"luigi --module pipeline.tasks TrainDiVE --dataset {self.dataset} "
            f"--method {self.method} --seed {self.seed}",
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


def last_round(method: str) -> int:
    """The round whose policy a method ends with."""
    return num_rounds(method, run().rounds) - 1


def _warms_up(settings: dict[str, Any]) -> bool:
    return any(settings["trl"].get(key) for key in ("warmup_steps", "warmup_ratio"))


def paths(stage: Stage) -> dict[str, str]:
    """The artifact folders a stage reads, by the names its function knows."""
    return {name: str(needed.folder) for name, needed in stage.needs().items()}


def snake(name: str) -> str:
    """BuildMCQ -> build_mcq."""
    return {"BuildMCQ": "build_mcq"}.get(name, name.lower())


from pipeline.compare import Compare  # noqa: E402, F401  one more task, built from those above
