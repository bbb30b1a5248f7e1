"""vLLM's importance-sampling correction, from log-probabilities found in the training pass itself.

TRL computes it beforehand, from a pass of its own. Where the first turn on a batch is taken with
the weights that generated it, that turn finds the same log-probabilities.
"""

import math
from typing import Any

import torch


def ratio(
    trainer: Any, old: torch.Tensor, sampling: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """What TRL multiplies the loss by: (rows, tokens), or (rows, 1) in the sequence modes.

    `old` and `sampling` are log-probabilities by the trained model and by vLLM; where `counted` is
    0, or vLLM could not tell, there is no correction. The modes and bounds are TRL's settings.
    """
    mode = trainer.vllm_importance_sampling_mode
    low = trainer.vllm_importance_sampling_clip_min
    high = trainer.vllm_importance_sampling_clip_max
    difference = torch.where(counted.bool(), old - sampling, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    found = difference.exp()
    if mode.endswith("truncate"):
        return found.clamp(min=low, max=high)
    outside = (found < (-math.inf if low is None else low)) | (
        found > (math.inf if high is None else high)
    )
    return found.masked_fill(outside, 0.0)


def log(trainer: Any, ratio: torch.Tensor, difference: torch.Tensor, counted: torch.Tensor) -> None:
    """TRL's figures on the correction, over the tokens that were forwarded on all processes."""
    mask = counted.bool()
    apart = difference[mask & ~difference.isnan()].abs()
    ratios = ratio.flatten() if ratio.size(1) == 1 else ratio[mask]
    nothing = torch.zeros(1, device=ratio.device)
    apart, ratios = (x if x.numel() else nothing for x in (apart, ratios))
    gather, metrics = trainer.accelerator.gather, trainer._metrics["train"]
    name = "sampling/sampling_logp_difference"
    metrics[f"{name}/mean"].append(gather(apart.mean()).mean().item())
    metrics[f"{name}/max"].append(gather(apart.max()).max().item())
    name = "sampling/importance_sampling_ratio"
    metrics[f"{name}/min"].append(gather(ratios.min()).min().item())
    metrics[f"{name}/mean"].append(gather(ratios.mean()).mean().item())
    metrics[f"{name}/max"].append(gather(ratios.max()).max().item())
