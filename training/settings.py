"""The settings of [BasePolicy] and [Train], and the inputs of one round of training."""

import math
import os
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from tasks.runtime.errors import StageError
from tasks.runtime.settings import Settings, nearest, setting
from training import trl_options

PARTS = ("vision", "projector", "language")  # of a vision-language model (training.model.trainable)
DTYPES = ("float32", "bfloat16", "float16")
ORDERS = ("shuffled", "curriculum")
# The largest size of a reward times its weight. TRL computes in float32 (at most 3.4e38), where the
# squares of a million of these can still be summed.
LARGEST_REWARD = 1e15
# The rewards that have a name; any other is a function of the user's own (training.data.reward_choice).
REWARDS = (
    "format",
    "letter",
    "exact",
    "graded",
    "difficulty_weighted",
    "think_length",
    "overlong",
    "virft_compat",
    "frequency",
    "contrast",
    "caption_format",
    "direct_format",
)
EMBEDDED = "embedded"  # [BasePolicy] model: the policy in training/base_policy


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """[BasePolicy] without training: the model, its image size, and its precision."""

    section: ClassVar[str] = "BasePolicy"

    model: str = setting("embedded, tiny, a model id of the hub, or a folder")
    min_pixels: int = setting("the area that a smaller image is enlarged to", at_least=1)
    max_pixels: int = setting("the area that a larger image is reduced to", at_least=1)
    dtype: str = setting("precision of the saved weights", choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class BasePolicySettings(ModelSettings):
    """[BasePolicy]: the policy that training starts from, and its supervised training."""

    steps: int = setting("supervised steps; 0: nothing is taught", at_least=0)
    batch_size: int = setting("examples a step", at_least=1)
    learning_rate: float = setting("of AdamW", at_least=0)
    muon_learning_rate: float = setting("of Muon on hidden matrices; 0: none", at_least=0)
    question_share: float = setting("share of multiple-choice examples", at_least=0, at_most=1)
    blind_share: float = setting("share of those with a grey image", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """[Train]: GRPO on frozen questions, and the supervised baseline on the same images."""

    section: ClassVar[str] = "Train"

    steps: int = setting("optimiser steps in each round; 0: as epochs says", at_least=0)
    epochs: float = setting(
        "passes over the questions in each round; 0: as steps says",
        at_least=0,
        unset=0,
        default=0.0,
    )
    max_questions: int = setting(
        "questions kept, of each set in proportion to its number of them; 0: all",
        at_least=0,
        unset=0,
        default=0,
    )
    questions_per_step: int = setting(at_least=1)
    num_generations: int = setting("completions per question, GRPO's group size", at_least=2)
    max_completion_length: int = setting("tokens", at_least=1)
    learning_rate: float = setting(above=0)
    rewards: dict[str, float] = setting("reward name or module:function -> weight")
    think_target: int = setting(
        "tokens of thought up to which the reward think_length pays in full", at_least=0, default=32
    )
    think_limit: int = setting("tokens of thought at which it pays 0", at_least=1, default=64)
    entropy_weight: float = setting(
        "of the answers' entropy in the reward frequency", at_least=0, at_most=1, unset=0.75
    )
    order: str = setting("of questions; curriculum: each epoch from easy to hard", choices=ORDERS)
    dynamic_sampling: int = setting(
        "how often groups without a gradient are replaced by further questions; 0: never",
        at_least=0,
    )
    freeze: str = setting("parts that stay", choices=("none", *PARTS), several=True)
    lora_rank: int = setting("of adapters; 0: all weights are trained", at_least=0)
    lora_alpha: float = setting(at_least=0)
    lora_dropout: float = setting(at_least=0, at_most=1)
    lora_targets: str = setting("parts with adapters", choices=PARTS, several=True)
    quantize: str = setting("of the weights below adapters; on a GPU", choices=("none", "nf4"))
    carry_over: bool = setting("rounds are one run: optimizer, schedule and step go on")
    watch_every: int = setting("steps between looks at val images; 0: never", at_least=0)
    watch_images: int = setting("val images looked at", at_least=1)
    keep_policy: str = setting("best: by val images", choices=("last", "best"))
    trl: dict[str, Any] = setting("any further option of TRL's GRPOConfig")
    dtype: str = setting("precision of the policy", choices=("float32", "bfloat16"))
    shared_prefix: bool = setting(
        "each group's image and prompt are computed once; the same up to rounding",
        significant=False,
    )
    tokens_per_micro_batch: int = setting(
        "with shared_prefix: tokens of one pass; 0: no bound", at_least=0, significant=False
    )
    check_shared_prefix: bool = setting(
        "compare the first batch with TRL's own pass", significant=False
    )
    check_largest_batch: bool = setting(
        "take the largest batch that the run can have before its first step", significant=False
    )
    micro_batch_size: int = setting(
        "completions a process holds at a time", at_least=1, significant=False
    )
    save_steps: int = setting("steps between checkpoints", at_least=1, significant=False)
    keep_checkpoints: int = setting("complete ones kept", at_least=1, significant=False)
    check_memory: bool = setting("refuse to start what cannot fit", significant=False)
    report_to: str = setting("tensorboard, wandb, ...; empty", significant=False)
    push_to_hub: str = setting(
        "a repository for the policy, made private; empty: none", significant=False
    )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen parts in full fine-tuning."""
        return _parts(self.freeze)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The parts whose linear layers have adapters; () where `lora_rank` is 0."""
        return _parts(self.lora_targets) if self.lora_rank else ()

    @property
    def quantized(self) -> bool:
        """Whether the weights below adapters are quantised."""
        return self.quantize != "none"

    @property
    def plans_ahead(self) -> bool:
        """Whether the training of a round depends on the number of rounds: by schedule or by order."""
        warms_up = any(self.trl.get(key) for key in ("warmup_steps", "warmup_ratio"))
        scheduled = self.trl.get("lr_scheduler_type", "linear") != "constant" or warms_up
        return scheduled or self.order == "curriculum"

    def with_steps(self, questions: int) -> "TrainSettings":
        """These settings with the steps that `epochs` comes to, given a round's number of questions.

        The last step may be the first of a further epoch: as in transformers, steps are rounded up.
        """
        if not self.epochs:
            return self
        kept = min(questions, self.max_questions or questions)
        steps = math.ceil(round(self.epochs * kept / self.questions_per_step, 6))
        return replace(self, steps=max(1, steps), epochs=0.0)

    def check_epochs(self, rounds: int) -> None:
        """Raise StageError where `epochs` says nothing: in one training over several rounds."""
        if self.epochs and self.carry_over and rounds > 1:
            raise StageError(
                f"[Train] epochs = {self.epochs:g} does not go with carry_over over {rounds} rounds, "
                "whose later questions are not known when the schedule begins; set steps, or "
                "carry_over = false, or [run] rounds = 1"
            )

    def check(self) -> None:
        if bool(self.steps) == bool(self.epochs):
            raise StageError(
                f"[Train] steps and epochs: exactly one must be above 0; got steps = {self.steps} "
                f"and epochs = {self.epochs:g}"
            )
        if not self.rewards:
            raise StageError(
                "[Train] rewards is empty; the paper's are {'format': 1.0, 'letter': 1.0}"
            )
        for name, weight in self.rewards.items():
            if problem := _unknown(name):
                raise StageError(f"[Train] rewards: {problem}")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise StageError(f"[Train] rewards: the weight of {name!r} must be a number")
            if not abs(weight) <= LARGEST_REWARD:
                raise StageError(
                    f"[Train] rewards: the weight of {name!r} must be a number of at most "
                    f"{LARGEST_REWARD:g} in size; got {weight:g}"
                )
        if self.think_limit <= self.think_target:
            raise StageError(
                f"[Train] think_limit must be above think_target; got {self.think_limit} and "
                f"{self.think_target}"
            )
        if problem := trl_options.problem(self.trl):
            raise StageError(f"[Train] trl: {problem}")
        apart = self.trl.get("multi_objective_aggregation") == "normalize_then_sum"
        if apart and self.trl.get("scale_rewards") not in (None, "group", True):
            raise StageError(
                f"[Train] trl: scale_rewards = {self.trl['scale_rewards']} does not go with "
                "multi_objective_aggregation = normalize_then_sum, with which TRL scales each reward by "
                "group and their sum by batch; leave one of them out"
            )
        if "none" in self.freeze and self.frozen:
            raise StageError(f"[Train] freeze must be none, or parts; got {self.freeze!r}")
        if self.frozen == PARTS:
            raise StageError("[Train] freeze names every part, so that nothing is left to train")
        if self.lora_rank and self.frozen:
            raise StageError(
                "[Train] freeze is for training all weights; with lora_rank set, lora_targets says "
                "which parts get adapters, and everything else is frozen"
            )
        if self.lora_rank and not self.adapted:
            raise StageError(
                f"[Train] lora_targets names no part; choose of {', '.join(PARTS)}, or lora_rank = 0 "
                "to train all weights"
            )
        if self.quantized and not self.lora_rank:
            raise StageError(
                f"[Train] quantize = {self.quantize} needs adapters to train: set lora_rank above 0"
            )
        if self.keep_policy == "best" and not self.watch_every:
            raise StageError(
                "[Train] keep_policy = best needs watch_every above 0 to know the best"
            )


@dataclass(frozen=True, kw_only=True)
class Round(Settings):
    """The inputs of one round of training: questions, images, starting policies, round number.

    `card` is one card's name, or several joined by +. `mcq`, `download` and `split` have one folder a
    card; the last two are empty without validation.
    """

    card: str
    method: str = setting("as the pipeline calls it")
    ask: str = setting("which questions `mcq` holds", choices=("mcq", "open"))
    reading: dict[str, Any] | None = setting(
        "card -> how answers are read, in training without labels", default=None
    )
    truth_rollout: bool = setting("the truth is one of every group's completions")
    unlabelled: str = setting("the images of training without labels, in words", default="")
    pairs: bool = setting("each question with its partner, in one step", default=False)
    mcq: list[Path]
    download: list[Path]
    split: list[Path]
    base: Path = setting("the policy that round 0 started from")
    policy: Path = setting("the policy that this round starts from")
    prompt_style: str
    refresh_round: int = setting("this round, from 0", at_least=0)
    rounds: int = setting("how many there are", at_least=1)
    seed: int


def _parts(words: str) -> tuple[str, ...]:
    """The parts that `words` names, in the order of PARTS."""
    named = words.replace(",", " ").split()
    return tuple(part for part in PARTS if part in named)


def _unknown(reward: str) -> str:
    """Why there is no reward of this name; empty where there is. No module is imported."""
    module, colon, _ = reward.partition(":")
    if not colon:
        known = "" if reward in REWARDS else nearest(reward, REWARDS)
        return known and f"unknown {reward!r} (one of your own is module:function){known}"
    top = module.partition(".")[0]
    found = top and (find_spec(top) or PathFinder.find_spec(top, [os.getcwd()]))
    return "" if found else f"{reward!r} cannot be imported: No module named {top!r}"
