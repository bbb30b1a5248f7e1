"""What we change about how TRL samples: the truth as a rollout, further questions, and the time.

Each is a class to mix into GRPOTrainer (`training.grpo` chooses), as small as it can be.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from trl.data_utils import prepare_multimodal_messages

from tasks.language import prompts
from tasks.language.prompts import LETTERS
from tasks.runtime.progress import doing
from training.data.sft_examples import thought
from training.loop import checkpoints
from training.settings import TrainSettings
from training.shared_prefix.prompts_once import remembered
from training.shared_prefix.trainer import make_trainer

if TYPE_CHECKING:  # what these are mixed into
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object

Row = dict[str, Any]


class KnownFields(Trainer):
    """Mends what TRL hands to its own pass of the model beside tokens, for some families.

    LLaVA-OneVision's number of images in each prompt, which TRL refuses, is left out: the model takes
    it to be one, as it is here. Token types (Gemma-3) come from a text with two tokens at its
    beginning where the prompt has one, and would stand one place further on (`tasks.language.prompts.rendered`).
    """

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        *arguments: Any,
        batch_num_images: Any = None,
        **named: Any,
    ) -> tuple:
        for name in ("token_type_ids", "mm_token_type_ids"):
            if named.get(name) is not None:
                named[name] = named[name][:, -input_ids.size(1) :]
        return super()._get_per_token_logps_and_entropies(model, input_ids, *arguments, **named)


class Timed(Trainer):
    """Logs the seconds of generating, rewarding and updating, and tokens generated a second."""

    def _generate(self, prompts: list) -> tuple:
        doing("generating")
        started = time.perf_counter()
        result = super()._generate(prompts)
        spent = time.perf_counter() - started
        doing("checking")  # what the reference and the policy before make of it
        tokens = sum(len(ids) for ids in result[1])
        self._spent("generation", spent)
        self._metrics["train"]["tokens_per_second"].append(
            tokens * self.accelerator.num_processes / spent
        )
        return result

    def _calculate_rewards(self, *arguments: Any) -> torch.Tensor:
        doing("rewarding")
        started = time.perf_counter()
        result = super()._calculate_rewards(*arguments)
        doing("updating")
        self._spent("reward", time.perf_counter() - started)
        self._metrics["train"]["dead_groups"][:] = [
            equal_groups(self, result).float().mean().item()
        ]
        return result

    def _spent(self, what: str, seconds: float) -> None:
        """Sums within a logging step: TRL averages what it finds in a list of several."""
        recorded = self._metrics["train"][f"seconds/{what}"]
        recorded[:] = [sum(recorded) + seconds]


def equal_groups(trainer: Trainer, paid: torch.Tensor) -> torch.Tensor:
    """Which groups' completions all earned the same, of rewards (completions, functions)."""
    total = (paid * trainer.reward_weights.to(paid.device)).nansum(1)
    grouped = total.view(-1, trainer.num_generations)
    return (grouped.max(1).values - grouped.min(1).values) < 1e-6


class TruthRollout(Trainer):
    """The last completion of every group is the truth in the policy's own format.

    Supervision and reinforcement in one stage, after ViSurf (arXiv 2510.10606): where no rollout is
    right, the group still has one to learn from; where all are, its advantage vanishes.
    """

    _asked: list[Row] | None = None  # what is being asked; None outside of training

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        self._asked = inputs
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids: list, *arguments: Any, **named: Any) -> tuple:
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *arguments, **named)
        if self._asked is None:
            return completion_ids, logprobs
        size, first = self.num_generations, self.accelerator.process_index * len(prompt_ids)
        for place in range(len(prompt_ids)):
            if (first + place) % size == size - 1:
                completion_ids[place] = self._truth(self._asked[place])
                if logprobs is not None:
                    logprobs[place] = [None] * len(completion_ids[place])
        return completion_ids, logprobs

    def _truth(self, row: Row) -> list[int]:
        name = row["options"][LETTERS.index(row["answer_letter"])]
        text = prompts.completion(thought(name), name)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: self.max_completion_length - 1], self.eos_token_ids[0]]


class DynamicSampling(Trainer):
    """Groups whose rewards are all equal carry no gradient; further questions stand in for them.

    After DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), with a bound: at most `attempts`
    times, and what is still without a gradient then stays. `further(count, occasion)` gives the
    questions. Completions are kept from being generated twice; rewards are so cheap that they are.
    """

    attempts: int = 0
    _paid: torch.Tensor  # this process's rewards, of the rows looked at last
    further: Callable[[int, int], list[Row]]

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        if not self.model.training or not self.attempts:
            return super()._generate_and_score_completions(inputs)
        with remembered(self.processing_class):  # every try, and what is trained on, asks for it
            return self._with_further(inputs)

    def _with_further(self, inputs: list[Row]) -> dict[str, Any]:
        rows = list(inputs)
        found = self._try(rows)
        groups, replaced = len(rows) // self.num_generations, []
        for attempt in range(self.attempts):
            dead = self._dead(rows, found)
            most = self._most(len(dead))
            if not most:
                break
            fresh = self._fresh(most, attempt)
            tried = self._try(fresh)
            kept = self._paid
            alive = [g for g in range(most) if g not in set(self._dead(fresh, tried))]
            self._paid = kept  # of the rows that are replaced
            for old, new in zip(dead, alive, strict=False):
                replaced += self._told(rows, found, self._members(old))
                rows[self._members(old)] = fresh[self._members(new)]
                for column, values in zip(found, tried, strict=True):
                    if column is not None and values is not None:
                        column[self._members(old)] = values[self._members(new)]
        size = groups * self.num_generations * self.accelerator.num_processes
        self.replaced = gather_object(replaced)
        self._metrics["train"]["replaced_groups"].append(len(self.replaced) / size)
        self._ready = deque([found])
        return super()._generate_and_score_completions(rows)

    def _generate(self, prompts: list) -> tuple:
        ready = getattr(self, "_ready", None)
        if ready:
            completion_ids, completions, logprobs = ready.popleft()
            prompt_ids, images, _ = self._tokenize_prompts(prompts)
            return prompt_ids, completion_ids, None, completions, logprobs, {}, images, []
        return super()._generate(prompts)

    def _try(self, rows: list[Row]) -> list[list | None]:
        """Completions for rows: their tokens, the completions as TRL has them, log-probabilities."""
        self._asked = rows
        size = self.num_generations  # a group has one prompt, not copies, which are made ready once
        asked = [
            prepare_multimodal_messages(row["prompt"], images=[row["image"]])
            for row in rows[::size]
        ]
        made = self._generate([prompt for prompt in asked for _ in range(size)])
        _, completion_ids, _, completions, logprobs, *_ = made
        return [completion_ids, completions, logprobs]

    def _dead(self, rows: list[Row], found: list[list | None]) -> list[int]:
        """This process's groups whose rewards are all equal."""
        completion_ids, completions, _ = found
        paid = self._calculate_rewards(
            rows, [row["prompt"] for row in rows], completions, completion_ids
        )
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        equal = equal_groups(self, paid)
        mine = len(rows) // self.num_generations
        start = self.accelerator.process_index * mine
        self._paid = paid[start * self.num_generations : (start + mine) * self.num_generations]
        return [g for g in range(mine) if equal[start + g]]

    def _told(self, rows: list[Row], found: list[list | None], members: slice) -> list[Row]:
        """What a replaced group said and earned, for the log."""
        completions = found[1] or []
        return [
            {
                "image_id": row["image_id"],
                "mcq_id": row["mcq_id"],
                "completion": completion[-1]["content"],
                "advantage": 0.0,
                **{
                    f"reward/{name}": value
                    for name, value in zip(self.reward_func_names, paid, strict=True)
                },
            }
            for row, completion, paid in zip(
                rows[members], completions[members], self._paid[members].tolist(), strict=True
            )
        ]

    def _most(self, count: int) -> int:
        """The largest number of any process: all of them must generate as often and as much."""
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max())

    def _fresh(self, groups: int, attempt: int) -> list[Row]:
        world, mine = self.accelerator.num_processes, self.accelerator.process_index
        micro = self.args.gradient_accumulation_steps
        batch = self.state.global_step * micro + self._step % micro
        occasion = batch * self.attempts + attempt
        rows = self.further(groups * world, occasion)[mine * groups : (mine + 1) * groups]
        return [row for row in rows for _ in range(self.num_generations)]

    def _members(self, group: int) -> slice:
        return slice(group * self.num_generations, (group + 1) * self.num_generations)


def trainer_of(settings: TrainSettings, *, truth_rollout: bool, **trl: Any) -> Any:
    """The trainer of these settings; `trl` are GRPOTrainer's own arguments."""
    trainer: Any = make_trainer(
        shared_prefix=settings.shared_prefix,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        check_first_batch=settings.check_shared_prefix,
        mixed=lambda kind: with_ours(kind, truth_rollout),
        **trl,
    )
    trainer.attempts = settings.dynamic_sampling
    return trainer


def with_ours(kind: type[Any], truth_rollout: bool) -> type[Any]:
    """A trainer with what is ours mixed in."""
    kinds: list[type] = [DynamicSampling, Timed, KnownFields, checkpoints.StrictResume, kind]
    if truth_rollout:
        kinds.insert(1, TruthRollout)
    return type("Trainer", tuple(kinds), {})
