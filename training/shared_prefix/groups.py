"""Makes TRL's generation batches of whole groups, and processes each prompt once.

The base class of `training.shared_prefix.trainer`. It finds the rows of each group, calls the
processor once a group, splits a batch into slots (the rows of one turn of the loss) and these into
micro-batches, and leaves out groups that need no forward pass.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tasks.runtime.errors import StageError
from training.shared_prefix import packing
from training.shared_prefix.forward import Rows, sharing
from training.shared_prefix.images_once import PIXELS, take
from training.shared_prefix.prompts_once import PromptsOnce
from training.shared_prefix.rollouts import RolloutsOnce

Batch = dict[str, Any]
# Every input, beside tokens and masks, that TRL may pass from a batch to the model.
IMAGE_INPUTS = (
    *PIXELS,
    "num_images",
    "num_tiles",
    "image_sizes",
    "image_position_ids",
    "pixel_attention_mask",
    "spatial_shapes",
    "token_type_ids",
    "mm_token_type_ids",
)


@dataclass
class Scope:
    """The context in which TRL's code asks for log-probabilities.

    `groups` has each row's group. Only `rows` are forwarded. The other rows take their values from
    `logps` and `entropies` (rows, completion tokens), which also collect the computed values.
    """

    groups: list[int]
    rows: list[int] | None = None  # None: all of them, in micro-batches
    logps: torch.Tensor | None = None
    entropies: torch.Tensor | None = None
    inputs: Batch | None = None  # the inputs of TRL's loss, while it is computed
    known: bool = False  # all values are known, so nothing is forwarded
    unneeded: bool = False  # the next call asks for old log-probabilities that nobody reads


class GroupTrainer(RolloutsOnce):
    """GRPOTrainer whose micro-batches are made of whole groups, with a bound on their tokens.

    Raises StageError where the model or TRL's settings do not allow it.
    """

    _buffered_inputs: list[Batch] | None
    _metrics: dict[str, defaultdict[str, list[float]]]

    def __init__(self, *args: Any, tokens_per_micro_batch: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._scope: Scope | None = None
        self.falls_back = False  # whether TRL's own pass is used, since the parity check failed
        self.way, why = sharing(self.model)
        if self.way == "none":
            raise StageError(f"[Train] shared_prefix: {why}; set shared_prefix = false")
        # With these options a micro-batch's part of the loss depends on the other micro-batches.
        alone = not self._entropy_bonus_enabled and not self.aux_loss_enabled
        alone = alone and self.top_entropy_quantile == 1.0
        if tokens_per_micro_batch and (not alone or self.is_deepspeed_enabled):
            raise StageError(
                "[Train] tokens_per_micro_batch does not go with DeepSpeed, an entropy bonus, "
                "top_entropy_quantile or an auxiliary loss; set it to 0"
            )
        # The KL term has a gradient in every group.
        self._skips = alone and self.beta == 0.0
        # TRL makes an extra pass for the old log-probabilities. If no weight changes before the first
        # turn of every slot, that turn computes the same values, and the extra pass is skipped.
        steps, window = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        self._corrects = self.use_vllm and self.vllm_importance_sampling_correction
        wanted = window % (steps * self.num_iterations) != 0 or self._corrects
        self._spares_old_pass = wanted and window % steps == 0 and not self.aux_loss_enabled

    # Generating and scoring: the processor gets each group's prompt and image once.

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        groups = self._groups_of(inputs)
        first = {group: inputs[rows[0]] for group, rows in packing.members(groups).items()}
        # All copies of an image become one object, since TRL copies prompts with their images.
        inputs = [
            row | {key: first[group][key] for key in ("image", "images") if key in row}
            for row, group in zip(inputs, groups, strict=True)
        ]
        processor = self.processing_class
        self._prompts = PromptsOnce(processor, groups, per_group=self.way == "prefix")
        self.processing_class = self._prompts
        try:
            with self._about(Scope(groups, unneeded=self._spares_old_pass)):
                batch = super()._generate_and_score_completions(inputs)
        finally:
            self.processing_class, self._prompts = processor, None
        if self._spares_old_pass:
            del batch["old_per_token_logps"]
            batch.pop("importance_sampling_ratio", None)
            if self._corrects:
                # TRL has just logged figures of log-probabilities that are not computed yet.
                figures = self._metrics["train" if self.model.training else "eval"]
                for name in [name for name in figures if name.startswith("sampling/")]:
                    figures[name].pop()
                    if not figures[name]:
                        del figures[name]
        return batch | {"groups": groups}

    def _groups_of(self, inputs: list[Batch]) -> list[int]:
        """Each row's group, numbered over the batches of all processes."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        start = self.accelerator.process_index * len(inputs)
        groups = [(start + row) // size for row in range(len(inputs))]
        for rows in packing.members(groups).values():
            if any(inputs[row]["prompt"] != inputs[rows[0]]["prompt"] for row in rows):
                raise StageError(
                    "the completions of a group have different prompts, though the sampler repeats "
                    "each row: a dataset row must not change between two reads, or set "
                    "shared_prefix = false"
                )
        return groups

    # Splitting into slots and micro-batches of whole groups.

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        if not self.model.training:
            batch = self._generate_and_score_completions(generation_batch)
            return self._slot(batch, range(len(batch["groups"])))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            count = len(batch["groups"])
            # Draws as many random numbers as TRL, so that a seed gives the same completions.
            rows = packing.shuffled(batch["groups"], torch.randperm(count).tolist())
            size = count // steps
            self._buffered_inputs = [
                self._slot(batch, rows[i * size : (i + 1) * size]) for i in range(steps)
            ]
        return self._buffered_inputs[self._step % steps]

    def _slot(self, batch: Batch, rows: Sequence[int]) -> Batch:
        """The inputs of one turn of TRL's loss: these rows, and their micro-batches."""
        whole = self._rows(batch, batch["groups"])
        rest = batch.keys() - whole.images.keys()
        slot = {key: take(batch[key], rows, len(whole.groups)) for key in rest}
        slot |= whole.by_row(rows, pixels=not whole.per_group)
        slot |= whole.by_group(rows) if whole.per_group else {}
        own = self._rows(slot, slot["groups"])
        members = packing.members(own.groups)
        nonzero = slot["advantages"].reshape(len(own.groups), -1).any(1).tolist()
        dead = {group for group, rows in members.items() if not any(nonzero[row] for row in rows)}
        skipped = dead if self._skips else set()
        live = [row for row, group in enumerate(own.groups) if group not in skipped]
        slot["micro_batches"] = self._micro_batches(own, live)
        slot["counted"] = {
            "groups": len(members),
            "zero_advantage_groups": len(dead),
            "zero_advantage_groups_forwarded": len(dead - skipped),
        }
        return slot

    def _rows(self, batch: Batch, groups: list[int]) -> Rows:
        return Rows(
            groups,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            batch["completion_ids"].size(1),
            {name: batch[name] for name in IMAGE_INPUTS if batch.get(name) is not None},
            self.way == "prefix",
        )

    def _micro_batches(self, rows: Rows, live: Sequence[int], most: int = 0) -> list[list[int]]:
        """Micro-batches of the rows `live`; empty ones in front give every process the same number."""
        batches = packing.split(
            rows.groups,
            live,
            rows.prompts,
            rows.completions,
            self.tokens_per_micro_batch,
            most,
            shared=rows.per_group and not self.falls_back,
        )
        count = torch.tensor([max(1, len(batches))], device=self.accelerator.device)
        longest = int(self.accelerator.gather(count).max())
        return [[] for _ in range(longest - len(batches))] + batches

    @contextmanager
    def _about(self, scope: Scope) -> Iterator[None]:
        """Make `scope` the context of the calls for log-probabilities."""
        before, self._scope = self._scope, scope
        try:
            yield
        finally:
            self._scope = before

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Discard the metrics that TRL records meanwhile."""
        metrics = self._metrics
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics = metrics


def counted_tokens(slot: Batch) -> torch.Tensor:
    """(rows, completion tokens): 1 for the tokens of a slot that are forwarded and count in the loss."""
    mask = slot["completion_mask"] * slot.get("tool_mask", 1)
    forwarded = torch.zeros_like(mask)
    forwarded[[row for rows in slot["micro_batches"] for row in rows]] = 1
    return mask * forwarded
