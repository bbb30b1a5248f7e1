"""Changes to TRL's sampling: truth rollouts, dynamic sampling, timing; mixins for GRPOTrainer.

`trainer_of` mixes them in as the settings ask.
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
from training.data.aggregation import equal_groups
from training.data.sft_examples import thought
from training.loop import checkpoints
from training.settings import TrainSettings
from training.shared_prefix.prompts_once import remembered
from training.shared_prefix.trainer import make_trainer

if TYPE_CHECKING:  # these are mixed into a GRPOTrainer
    from trl import GRPOTrainer as Trainer
else:
    Trainer = object

Row = dict[str, Any]


class KnownFields(Trainer):
    """Corrects model inputs that TRL passes wrongly for some families.

    LLaVA-OneVision has `batch_num_images`, which TRL's pass does not accept. It is dropped: the model
    then assumes one image a prompt, which is right here. Gemma-3's token types are made from a text
    with two BOS tokens (`tasks.language.prompts.rendered`), so they are one longer than the prompt;
    their surplus first entry is cut.
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
    """Logs the seconds of generating and rewarding, tokens a second, and zero-variance groups.

    It also puts the chat template's <think> back before the completions (`prompts.opening`), so that
    rewards and logs read the whole. And it keeps zero-variance groups without a gradient where each
    reward is normalised apart (`normalize_then_sum`): TRL then divides by the standard deviation of the
    whole batch, which turns rounding into advantages, large ones where no group has a variance.
    """

    _equal: torch.Tensor | None = None  # which groups of the last rewards have zero variance

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        equal, self._equal = self._equal, None
        if self.multi_objective_aggregation == "normalize_then_sum" and equal is not None:
            rows = equal.repeat_interleave(self.num_generations)
            logged = self._logs["advantages"]
            for place in rows.nonzero().flatten().tolist():
                logged[len(logged) - len(rows) + place] = 0.0
            start = self.accelerator.process_index * len(inputs)
            batch["advantages"][rows[start : start + len(inputs)]] = 0.0
        return batch

    def _generate(self, chats: list) -> tuple:
        doing("generating")
        started = time.perf_counter()
        result = super()._generate(chats)
        spent = time.perf_counter() - started
        opening = prompts.opening(self.processing_class)
        for messages in result[3]:
            messages[-1]["content"] = opening + messages[-1]["content"]
        doing("checking")  # the old policy and the reference model score the completions
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
        self._equal = equal_groups(self, result)
        self._metrics["train"]["dead_groups"][:] = [self._equal.float().mean().item()]
        return result

    def _spent(self, what: str, seconds: float) -> None:
        """Add up the seconds of a logging step: TRL would average a list of several values."""
        recorded = self._metrics["train"][f"seconds/{what}"]
        recorded[:] = [sum(recorded) + seconds]


class TruthRollout(Trainer):
    """Replaces the last completion of every group by the right answer, in the form of prompt style `style`.

    This joins supervision and reinforcement in one stage, after ViSurf (arXiv 2510.10606). A group
    without a right rollout still has one to learn from. Where all rollouts are right, the added one
    has no advantage.
    """

    style: str = "brief"
    _asked: list[Row] | None = None  # the rows that are being completed; None outside of training

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
        text = prompts.completion(thought(name), name, self.style)
        text = text.removeprefix(prompts.opening(self.processing_class))
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: self.max_completion_length - 1], self.eos_token_ids[0]]


class DynamicSampling(Trainer):
    """Replaces zero-variance groups, which carry no gradient, by groups of further questions.

    After DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), but with at most `attempts` tries:
    zero-variance groups that are left after the last try stay. `further(count, occasion)` returns the
    questions. Each completion is generated once; rewards are cheap and are computed twice.
    """

    attempts: int = 0
    _rewards: torch.Tensor  # (completions, functions) of this process, of the last `_dead` call
    further: Callable[[int, int], list[Row]]

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        if not self.model.training or not self.attempts:
            return super()._generate_and_score_completions(inputs)
        with remembered(
            self.processing_class
        ):  # every try and the training batch process the same pictures
            return self._with_further(inputs)

    def _with_further(self, inputs: list[Row]) -> dict[str, Any]:
        rows = list(inputs)
        samples = self._sample(rows)
        groups, replaced = len(rows) // self.num_generations, []
        for attempt in range(self.attempts):
            dead = self._dead(rows, samples)
            most = self._most(len(dead))
            if not most:
                break
            fresh = self._fresh(most, attempt)
            fresh_samples = self._sample(fresh)
            kept = self._rewards
            dead_too = set(self._dead(fresh, fresh_samples))
            alive = [g for g in range(most) if g not in dead_too]
            self._rewards = kept  # of the rows that are replaced
            for old, new in zip(dead, alive, strict=False):
                replaced += self._log_rows(rows, samples, self._members(old))
                rows[self._members(old)] = fresh[self._members(new)]
                for column, values in zip(samples, fresh_samples, strict=True):
                    if column is not None and values is not None:
                        column[self._members(old)] = values[self._members(new)]
        size = groups * self.num_generations * self.accelerator.num_processes
        self.replaced = gather_object(replaced)
        self._metrics["train"]["replaced_groups"].append(len(self.replaced) / size)
        self._ready = deque([samples])
        return super()._generate_and_score_completions(rows)

    def _generate(self, prompts: list) -> tuple:
        ready = getattr(self, "_ready", None)
        if ready:
            completion_ids, completions, logprobs = ready.popleft()
            prompt_ids, images, _ = self._tokenize_prompts(prompts)
            return prompt_ids, completion_ids, None, completions, logprobs, {}, images, []
        return super()._generate(prompts)

    def _sample(self, rows: list[Row]) -> list[list | None]:
        """Generate one completion a row: [token ids, TRL's completions, log-probabilities or None]."""
        self._asked = rows
        size = self.num_generations  # the rows of a group share one prompt object, processed once
        chats = [
            prepare_multimodal_messages(row["prompt"], images=[row["image"]])
            for row in rows[::size]
        ]
        generated = self._generate([chat for chat in chats for _ in range(size)])
        _, completion_ids, _, completions, logprobs, *_ = generated
        return [completion_ids, completions, logprobs]

    def _dead(self, rows: list[Row], samples: list[list | None]) -> list[int]:
        """This process's zero-variance groups; keeps the rewards in `_rewards`."""
        completion_ids, completions, _ = samples
        rewards = self._calculate_rewards(
            rows, [row["prompt"] for row in rows], completions, completion_ids
        )
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        equal = equal_groups(self, rewards)
        mine = len(rows) // self.num_generations
        start = self.accelerator.process_index * mine
        self._rewards = rewards[
            start * self.num_generations : (start + mine) * self.num_generations
        ]
        return [g for g in range(mine) if equal[start + g]]

    def _log_rows(self, rows: list[Row], samples: list[list | None], members: slice) -> list[Row]:
        """A replaced group's completions and rewards, as rows of `completions-*.parquet`."""
        completions = samples[1] or []
        return [
            {
                "image_id": row["image_id"],
                "mcq_id": row["mcq_id"],
                "completion": completion[-1]["content"],
                "advantage": 0.0,
                **{
                    f"reward/{name}": value
                    for name, value in zip(self.reward_func_names, rewards, strict=True)
                },
            }
            for row, completion, rewards in zip(
                rows[members], completions[members], self._rewards[members].tolist(), strict=True
            )
        ]

    def _most(self, count: int) -> int:
        """The largest `count` of any process: all must generate equally often and equally much."""
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max())

    def _fresh(self, groups: int, attempt: int) -> list[Row]:
        """This process's rows of further questions, `num_generations` rows for each of `groups`."""
        world, mine = self.accelerator.num_processes, self.accelerator.process_index
        micro = self.args.gradient_accumulation_steps
        batch = self.state.global_step * micro + self._step % micro
        occasion = batch * self.attempts + attempt
        rows = self.further(groups * world, occasion)[mine * groups : (mine + 1) * groups]
        return [row for row in rows for _ in range(self.num_generations)]

    def _members(self, group: int) -> slice:
        """The places of a group's rows."""
        return slice(group * self.num_generations, (group + 1) * self.num_generations)


def trainer_of(settings: TrainSettings, *, truth_rollout: bool, **trl: Any) -> Any:
    """A trainer with these settings; `trl` are GRPOTrainer's own arguments."""
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
    """The trainer class `kind` with the mixins of this module and strict resuming."""
    kinds: list[type] = [DynamicSampling, Timed, KnownFields, checkpoints.StrictResume, kind]
    if truth_rollout:
        kinds.insert(1, TruthRollout)
    return type("Trainer", tuple(kinds), {})
