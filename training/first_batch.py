"""Whether shared and separate forward passes agree, found out on the batch that training begins with."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

from tasks.run import StageError

# The largest difference of a log-probability, and of the gradient relative to its norm: in float32,
# and where anything is rounded to 16 bits, which moves gradients by hundredths.
EXACT, ROUGH = (1e-3, 1e-3), (1.0, 0.2)
MOST_WEIGHTS = 20_000_000  # of those trained, so many are compared: smallest tensors first

Pass = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def compare(
    model: torch.nn.Module, shared: Pass, separate: Pass, *, gradients: bool, exact: bool
) -> str:
    """A sentence on how far two passes agree; StageError with the figures where they do not.

    Each gives log-probabilities (rows, tokens) and the mask of those that count, on the same
    weights; `exact` where all is computed in float32. Dropout is off meanwhile; gradients do not touch those that training accumulates.
    """
    weights = _weights(model) if gradients else []
    with _no_dropout(model):
        ours, our_gradient = _measured(shared, weights)
        theirs, their_gradient = _measured(separate, weights)
    apart = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    norm = sum(float(g.float().square().sum()) for g in their_gradient) ** 0.5
    pairs = zip(our_gradient, their_gradient, strict=True)
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs) ** 0.5
    relative = difference / norm if norm else difference
    most_apart, most_relative = EXACT if exact else ROUGH
    figures = f"log-probabilities within {apart:.1e}"
    if weights:
        figures += f", gradients within {relative:.1e} of their norm"
    if not (apart <= most_apart and relative <= most_relative):  # also true of NaN
        raise StageError(
            f"shared-prefix training and TRL's own forward pass disagree on the first batch: "
            f"{figures}, where {most_apart:g} and {most_relative:g} are allowed; "
            f"set shared_prefix = false and please report it"
        )
    return f"train: shared and separate forward passes agree on the first batch: {figures}"


def _measured(run: Pass, weights: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.set_grad_enabled(bool(weights)):
        logps, mask = run()
        counted = logps[mask.bool()]
        if not weights or not counted.numel():
            return counted.detach(), []
        # Weights of both signs and many sizes, so that errors do not cancel.
        signs = torch.linspace(-1, 1, counted.numel(), device=counted.device)
        found = torch.autograd.grad((counted * signs).sum(), weights, allow_unused=True)
    return counted.detach(), [
        torch.zeros_like(weight) if gradient is None else gradient
        for gradient, weight in zip(found, weights, strict=True)
    ]


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel)
    chosen: list[torch.Tensor] = []
    total = 0
    for weight in trained:
        total += weight.numel()
        if chosen and total > MOST_WEIGHTS:
            break
        chosen.append(weight)
    return chosen


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
