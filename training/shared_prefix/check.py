"""The parity check: compares shared and separate forward passes on the first training batch.

Two correct passes differ by rounding: in 16 bits by hundredths of a nat a token, and more with depth.
So the check first measures this machine's noise, by running the separate pass again, one row at a
time. Rounding has no direction and a fault has one. The check bounds the mean, the 99th percentile and
the signed mean of the log-probabilities' differences, and the angle between the gradients.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from trl.trainer.utils import use_adapter

from tasks.runtime.progress import doing
from training.model.grpo_trainer import GRPOTrainer
from training.shared_prefix import packing, vllm_correction
from training.shared_prefix.forward import Rows, TokenScores, base_of, packed, padded, put

MOST_WEIGHTS = 20_000_000  # trained weights whose gradients are compared, smallest tensors first
TIMES = 3.0  # a difference of up to this many times the noise is allowed

# A forward pass: places of rows in the batch -> their log-probabilities (rows, completion tokens).
Pass = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Distance:
    """The distance of two passes: nats a token, and `angle`, 1 less the cosine of their gradients."""

    mean: float
    p99: float
    bias: float
    angle: float

    def described(self) -> str:
        """The figures, as a part of a sentence."""
        return (
            f"mean {self.mean:.1e}, 99th percentile {self.p99:.1e}, signed mean {self.bias:+.1e} nats a "
            f"token, gradients {self.angle:.1e} from parallel"
        )


# The allowed distances: where all is computed in float32, and, on top of the noise, where anything is
# rounded to 16 bits.
EXACT = Distance(mean=1e-4, p99=1e-3, bias=1e-4, angle=1e-5)
ROUGH = Distance(mean=2e-2, p99=1e-1, bias=1e-2, angle=1e-3)


@dataclass(frozen=True)
class Verdict:
    """Whether the passes agree, and the figures in words; empty where memory ran out."""

    agrees: bool
    figures: str


def agree(trainer: Any, model: torch.nn.Module, rows: Rows) -> bool:
    """Whether a SharedPrefixTrainer's shared and separate passes agree; prints one line.

    Compares at most two rows of each of the first two groups. Every process must call it; all return
    False if the passes disagree on any. Where memory runs out, they count as agreeing.
    """
    groups = list(packing.members(rows.groups).values())[:2]
    scored = [[row for row in group if rows.completions[row]][:2] for group in groups]
    compared = [row for group in scored for row in group] or [0]
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    sharded = sharded or any(isinstance(p, DTensor) for p in model.parameters())
    inner = model if sharded else trainer.accelerator.unwrap_model(model)
    stock = functools.partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer, inner)

    def values(scores: TokenScores, own: list[int]) -> torch.Tensor:
        logps = scores.logps.new_zeros(len(rows.groups), rows.keep)
        return put(logps, scores.place, scores.logps)[own]

    def shared(places: list[int]) -> torch.Tensor:
        own = [compared[place] for place in places]
        with trainer.accelerator.autocast():
            scores = packed(inner, rows, own) if rows.per_group else padded(stock, rows, own, False)
        return values(scores, own)

    def separate(places: list[int]) -> torch.Tensor:
        own = [compared[place] for place in places]
        with trainer.encoders[id(base_of(model))].off():
            return values(padded(stock, rows, own, False), own)

    # A single row has fewer padding columns, so it is rounded differently. With sharded weights every
    # process must forward equally often, so there all rows go at once, in reverse order.
    places = list(range(len(compared)))
    again = [places[::-1]] if sharded else [[place] for place in places]
    reentrant = (trainer.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    doing("checking")
    try:
        verdict = compare(
            inner,
            shared,
            separate,
            again,
            rows.attention_mask[compared][:, -rows.keep :],
            gradients=not sharded and not reentrant,  # torch.autograd.grad works with neither
            exact=trainer.accelerator.mixed_precision == "no"
            and all(p.dtype == torch.float32 for p in inner.parameters()),
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if sharded or not out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        verdict = Verdict(True, "")
    disagrees = torch.tensor([int(not verdict.agrees)], device=trainer.accelerator.device)
    doing("updating")
    agreed = not bool(trainer.accelerator.gather(disagrees).any())
    if trainer.accelerator.is_main_process:
        print(f"train: {_sentence(agreed, verdict.figures)}", flush=True)
    return agreed


@torch.no_grad()
def rescore(trainer: Any, batch: dict[str, Any], rows: Rows) -> None:
    """Recompute the log-probabilities that a batch already holds, after the passes disagreed."""

    def logps(model: torch.nn.Module) -> torch.Tensor:
        scored: torch.Tensor = trainer._get_per_token_logps_and_entropies(
            model,
            rows.input_ids,
            rows.attention_mask,
            rows.keep,
            batch_size=trainer.args.per_device_train_batch_size,
            **rows.images,
        )[0]
        return scored

    if "old_per_token_logps" in batch:
        batch["old_per_token_logps"] = old = logps(trainer.model)
        if "importance_sampling_ratio" in batch:
            counted = batch["completion_mask"] * batch.get("tool_mask", 1)
            batch["importance_sampling_ratio"] = vllm_correction.ratio(
                trainer, old, batch["sampling_per_token_logps"], counted
            )
    if "ref_per_token_logps" in batch:
        if trainer.ref_model is not None:
            batch["ref_per_token_logps"] = logps(trainer.ref_model)
        else:
            inner = trainer.accelerator.unwrap_model(trainer.model)
            with use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                batch["ref_per_token_logps"] = logps(trainer.model)


def _sentence(agreed: bool, figures: str) -> str:
    if agreed and not figures:
        return (
            "there is not enough memory to compare shared and separate forward passes; not checked"
        )
    if agreed:
        return f"shared and separate forward passes agree on the first batch: {figures}"
    return (
        f"warning: shared and separate forward passes disagree on the first batch ({figures}); training "
        "goes on with TRL's own pass, which is slower; please report it"
    )


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out, on a GPU or in main memory."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        "out of memory" in message or "not enough memory" in message
    )


def compare(
    model: torch.nn.Module,
    shared: Pass,
    separate: Pass,
    again: Sequence[list[int]],
    counted: torch.Tensor,
    *,
    gradients: bool,
    exact: bool,
) -> Verdict:
    """Compare the passes `shared` and `separate` on the same weights.

    `counted` (rows, completion tokens) is 1 for the tokens that are scored. `again` has the parts in
    which the separate pass repeats the rows, to measure the noise. `gradients` compares gradients,
    too, without touching those that training accumulates. `exact` says that all is computed in
    float32. Dropout is off meanwhile.
    """
    whole = list(range(len(counted)))
    weights = _weights(model) if gradients else []
    # The tokens' weights in the score have both signs and many sizes, so that errors do not cancel.
    signs = torch.zeros_like(counted, dtype=torch.float32)
    signs[counted.bool()] = torch.linspace(-1, 1, int(counted.sum()), device=signs.device)
    with _no_dropout(model):
        reference = _measured(separate, [whole], weights, counted, signs)
        ours = _measured(shared, [whole], weights, counted, signs)
        noise = _distance(_measured(separate, again, weights, counted, signs), reference)
    distance = _distance(ours, reference)
    allowed = EXACT if exact else _allowed(noise)
    agrees = all(  # a NaN agrees with nothing
        abs(getattr(distance, name)) <= getattr(allowed, name)
        for name in ("mean", "p99", "bias", "angle")
    )
    return Verdict(
        agrees,
        f"{distance.described()}; this machine's own noise: mean {noise.mean:.1e}, 99th {noise.p99:.1e}",
    )


def _allowed(noise: Distance) -> Distance:
    """The distance allowed with some noise; for the bias by its mean, as noise itself has little bias."""
    return Distance(
        ROUGH.mean + TIMES * noise.mean,
        ROUGH.p99 + TIMES * noise.p99,
        ROUGH.bias + 0.5 * noise.mean,
        ROUGH.angle + TIMES * noise.angle,
    )


Measured = tuple[torch.Tensor, list[torch.Tensor]]


def _measured(
    run: Pass,
    parts: Sequence[list[int]],
    weights: list[torch.Tensor],
    counted: torch.Tensor,
    signs: torch.Tensor,
) -> Measured:
    """The scored log-probabilities in the order of the rows, and the gradient of their weighted sum."""
    logps = torch.zeros_like(signs)
    total = [torch.zeros_like(weight) for weight in weights]
    with torch.set_grad_enabled(bool(weights)):
        for rows in parts:
            values = run(rows).float()
            logps[rows] = values.detach()
            if not weights:
                continue
            score = (values * signs[rows]).sum()
            each = torch.autograd.grad(score, weights, allow_unused=True)
            for sum_, gradient in zip(total, each, strict=True):
                if gradient is not None:
                    sum_ += gradient
    return logps[counted.bool()], total


def _distance(one: Measured, other: Measured) -> Distance:
    difference = one[0] - other[0]
    if not difference.numel():
        return Distance(0.0, 0.0, 0.0, 0.0)
    return Distance(
        float(difference.abs().mean()),
        float(difference.abs().quantile(0.99)),
        float(difference.mean()),
        _angle(one[1], other[1]),
    )


def _angle(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """1 less the cosine, by the difference of unit vectors, which is exact for nearly parallel ones."""

    def dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        pairs = zip(one, other, strict=True)
        return sum(float((a.double() * b.double()).sum()) for a, b in pairs)

    norms = dot(ours, ours) ** 0.5, dot(theirs, theirs) ** 0.5
    if not any(norms):
        return 0.0
    if not all(norms):
        return 1.0
    apart = sum(
        float((a.double() / norms[0] - b.double() / norms[1]).square().sum())
        for a, b in zip(ours, theirs, strict=True)
    )
    return apart / 2


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel)
    weights: list[torch.Tensor] = []
    total = 0
    for weight in trained:
        total += weight.numel()
        if weights and total > MOST_WEIGHTS:
            break
        weights.append(weight)
    return weights


@contextmanager
def _no_dropout(model: torch.nn.Module) -> Any:
    dropped = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    for module in dropped:
        module.eval()
    try:
        yield
    finally:
        for module in dropped:
            module.train()
