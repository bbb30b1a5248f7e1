"""The GRPO trainer that computes a group's image and prompt once, for vision-language models.

All completions of a GRPO group share one image and one prompt. TRL encodes the image, and forwards
the prompt, once for every completion. `SharedPrefixTrainer` does both once a group:

- It packs a prompt and its completions into one row without padding (`packing`, `attention`,
  `forward`).
- It skips groups whose gradient is zero, and processes each image once (`groups`, `prompts_once`).
- The loss is TRL's own code on tensors of TRL's shapes, so log-probabilities, loss and gradients equal
  TRL's up to rounding.

The architecture decides what is shared: "prefix" (image and prompt) for Qwen2.5-VL and Qwen2-VL,
"vision" (the image) for others, whose padded rows go through TRL's own pass.

The class overrides internals of TRL 1.16; `tests/training/shared_prefix/test_trainer.py` fails when
they change.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from training.model import sharding
from training.model.grpo_trainer import GRPOTrainer
from training.model.rollout_engine import by_vllm
from training.shared_prefix import attention, check, vllm_correction
from training.shared_prefix.forward import Rows, TokenScores, base_of, packed, padded, put, sharing
from training.shared_prefix.groups import GroupTrainer, Scope, counted_tokens
from training.shared_prefix.images_once import ImagesOnce
from training.shared_prefix.packing import Stopwatch

Batch = dict[str, Any]
# What the architecture allows to share -> the line that is printed.
SHARES = {
    "prefix": "image and prompt go through the model once a group",
    "vision": "images are encoded once a group, prompts go through once a completion",
    "none": "TRL's own trainer",
}


def trainer_kind(model: torch.nn.Module, shared_prefix: bool, **trl: Any) -> type[GRPOTrainer]:
    """The trainer class for `model`: TRL's own, where nothing is shared. Prints what is shared.

    `trl` are GRPOTrainer's own arguments.
    """
    way, why = sharing(model) if shared_prefix else ("none", "shared_prefix = false")
    if shared_prefix and any(
        trl.get(key) for key in ("tools", "rollout_func", "environment_factory")
    ):
        way, why = "none", "tools and rollouts of its own may change a prompt within its group"
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"train: {SHARES[way]} ({why})", flush=True)
    return GRPOTrainer if way == "none" else SharedPrefixTrainer


def make_trainer(
    *,
    model: torch.nn.Module,
    shared_prefix: bool,
    tokens_per_micro_batch: int = 0,
    check_first_batch: bool = True,
    mixed: Callable[[type[GRPOTrainer]], type[GRPOTrainer]] | None = None,
    **trl: Any,
) -> GRPOTrainer:
    """A trainer of the class that `trainer_kind` returns; `mixed` adds mixins to that class.

    TRL's own trainer ignores `tokens_per_micro_batch` and `check_first_batch`.
    """
    kind = trainer_kind(model, shared_prefix, **trl)
    kind = by_vllm(kind) if trl["args"].use_vllm else kind
    own = {"tokens_per_micro_batch": tokens_per_micro_batch, "check_first_batch": check_first_batch}
    options = own if issubclass(kind, SharedPrefixTrainer) else {}
    return (mixed(kind) if mixed else kind)(model=model, **options, **trl)


class SharedPrefixTrainer(GroupTrainer):
    """GRPOTrainer that computes a group's image and prompt once.

    `tokens_per_micro_batch` bounds the tokens of one forward and backward pass (0: the whole
    `per_device_train_batch_size` at once); the gradient stays that of the whole batch.
    `check_first_batch` runs the parity check on the first batch; if it fails, training goes on with
    TRL's own pass. `counters` counts this process's work, which each log entry has as `shared/...`.
    """

    def __init__(
        self,
        *args: Any,
        tokens_per_micro_batch: int = 0,
        check_first_batch: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            *args,
            tokens_per_micro_batch=tokens_per_micro_batch,
            check_first_batch=check_first_batch,
            **kwargs,
        )
        self._unchecked = check_first_batch
        self.encoders: dict[int, ImagesOnce] = {}
        for model in (self.model, self.ref_model):
            if model is not None:
                base = base_of(model)
                self.encoders[id(base)] = ImagesOnce(base.base_model)
                if self.way == "prefix":
                    attention.install(base)

    # Log-probabilities, for which TRL's code calls.

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        scope = self._scope
        assert scope is not None
        images = {name: value for name, value in images.items() if value is not None}
        rows = Rows(
            scope.groups, input_ids, attention_mask, logits_to_keep, images, self.way == "prefix"
        )
        stock = functools.partial(super()._get_per_token_logps_and_entropies, model)
        if compute_aux_loss:
            whole = rows.by_row(range(len(input_ids)))
            return stock(
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                True,
                **whole,
            )
        logps = torch.zeros_like(attention_mask[:, -logits_to_keep:], dtype=torch.float32)
        entropies = logps
        if scope.logps is not None and scope.entropies is not None:
            logps, entropies = scope.logps, scope.entropies
        if scope.known or scope.unneeded:
            scope.unneeded = False
            return logps, entropies, None
        if scope.rows is None:
            batches = self._micro_batches(rows, range(len(input_ids)), batch_size or 0)
        else:
            batches = [scope.rows]
        for micro_batch in batches:
            if micro_batch:
                scores = self._forward(model, stock, rows, micro_batch, compute_entropy)
                logps = put(logps, scores.place, scores.logps)
                if scores.entropies is not None:
                    entropies = put(entropies, scores.place, scores.entropies)
            else:
                logps = logps + self._zero(model, stock, rows)
        if scope.rows is not None:
            scope.logps, scope.entropies = logps.detach(), entropies.detach()
            self._correct(scope)
        return logps, entropies if compute_entropy else None, None

    def _forward(
        self, model: torch.nn.Module, stock: Any, rows: Rows, micro_batch: list[int], entropy: bool
    ) -> TokenScores:
        """Forward a micro-batch by the way of this model, and count it."""
        encoder = self.encoders[id(base_of(model))]
        before = encoder.patches
        with self.accelerator.autocast():
            if self.falls_back:
                with encoder.off():
                    scores = padded(stock, rows, micro_batch, entropy)
            elif rows.per_group:
                scores = packed(model, rows, micro_batch)
            else:
                scores = padded(stock, rows, micro_batch, entropy)
        counters = self.counters
        counters.vision_patches += encoder.patches - before
        counters.lm_tokens += scores.tokens
        counters.lm_tokens_ideal += rows.ideal(micro_batch)
        counters.lm_tokens_stock += len(micro_batch) * rows.input_ids.size(1)
        counters.completion_tokens_forwarded += scores.completion_tokens
        counters.completion_tokens_useful += sum(rows.completions[row] for row in micro_batch)
        return scores

    def _zero(self, model: torch.nn.Module, stock: Any, rows: Rows) -> torch.Tensor:
        """A zero whose gradient is zero, for an empty micro-batch.

        With sharded weights every process must take part in every forward and backward pass, vision
        tower included. So this process forwards its shortest row, and multiplies the result by zero.
        """
        device = rows.input_ids.device
        if self.accelerator.num_processes == 1:
            return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        lengths = [
            (p + c, row)
            for row, (p, c) in enumerate(zip(rows.prompts, rows.completions, strict=True))
            if c
        ]
        kept = dict(vars(self.counters))
        scores = self._forward(model, stock, rows, [min(lengths)[1]], False)
        vars(self.counters).update(kept)
        return 0.0 * scores.logps.sum()

    # The loss: TRL's own, computed once for each micro-batch.

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        rows = self._rows(inputs, inputs["groups"])
        if self._unchecked and self.model.training:
            self._unchecked = False
            self.falls_back = not check.agree(self, model, rows)
            if self.falls_back:
                self._start_anew()
        for name, count in inputs["counted"].items():
            setattr(self.counters, name, getattr(self.counters, name) + count)
        # A row that is not forwarded keeps its old value, so that its ratio is one.
        other = inputs.get("old_per_token_logps", inputs.get("ref_per_token_logps"))
        if other is None:
            other = torch.zeros_like(inputs["completion_mask"], dtype=torch.float32)
        scope = Scope(rows.groups, logps=other, entropies=torch.zeros_like(other), inputs=inputs)
        *others, scope.rows = inputs["micro_batches"]
        last = scope.rows
        with self._about(scope):
            for scope.rows in others:
                with sharding.unreduced(self, model), self._unlogged():
                    part = super()._compute_loss(model, inputs)
                    if torch.is_grad_enabled():
                        self.accelerator.backward(part)
            scope.rows = last
            if not others:
                loss = super()._compute_loss(model, inputs)
            else:
                with self._unlogged():
                    loss = super()._compute_loss(model, inputs)
                scope.known = True
                with (
                    torch.no_grad()
                ):  # TRL's loss and metrics, from the values of all micro-batches
                    value = super()._compute_loss(model, inputs)
                loss = loss + (value - loss).detach()
        if self._skips:
            self._log_entropy(scope, inputs)
        if self._spares_old_pass and "old_per_token_logps" not in inputs:
            inputs["old_per_token_logps"] = scope.logps
            if self._corrects and self.model.training:
                sampling, counted = inputs["sampling_per_token_logps"], counted_tokens(inputs)
                ratio, apart = inputs["importance_sampling_ratio"], scope.logps - sampling
                vllm_correction.log(self, ratio, apart, counted)
        return loss

    def _correct(self, scope: Scope) -> None:
        """On a slot's first turn, compute the vLLM correction, which TRL's loss reads after this pass."""
        inputs = scope.inputs
        assert inputs is not None
        if self._spares_old_pass and self._corrects and "old_per_token_logps" not in inputs:
            sampling, counted = inputs["sampling_per_token_logps"], counted_tokens(inputs)
            inputs["importance_sampling_ratio"] = vllm_correction.ratio(
                self, scope.logps, sampling, counted
            )

    def _log_entropy(self, scope: Scope, inputs: Batch) -> None:
        """Replace TRL's entropy, a mean over all tokens, by the mean over the forwarded ones."""
        counted = counted_tokens(inputs)
        sums = torch.stack([(scope.entropies * counted).sum(), counted.sum().float()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"][-1] = total / count if count else float("nan")

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any) -> Any:
        with Stopwatch(self.counters):
            loss = super().training_step(model, inputs, num_items_in_batch)
        assert self._buffered_inputs is not None
        slot = self._buffered_inputs[(self._step - 1) % self.args.steps_per_generation]
        if not any(slot["micro_batches"]):
            # In TRL the gradient is zero here and not None: momentum and decay still move the weights.
            for weight in model.parameters():
                if weight.requires_grad and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            logs |= {f"shared/{name}": value for name, value in self.counters.since_last().items()}
        super().log(logs, start_time)

    def _start_anew(self) -> None:
        """Recompute the buffered slots' micro-batches and log-probabilities for TRL's own pass."""
        for slot in self._buffered_inputs or []:
            live = [row for rows in slot["micro_batches"] for row in rows]
            rows = self._rows(slot, slot["groups"])
            slot["micro_batches"] = self._micro_batches(rows, live)
            with self._about(Scope(rows.groups)):
                check.rescore(self, slot, rows)
