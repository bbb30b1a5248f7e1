"""The importance-sampling correction for vLLM, from the training pass's log-probabilities.

TRL computes the correction beforehand, by an extra pass. When the first turn on a batch still has
the weights that generated it, the training pass computes the same log-probabilities.
"""

import math
from typing import Any

import torch


def ratio(
    trainer: Any, old: torch.Tensor, sampling: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """The factor of TRL's loss: (rows, tokens), or (rows, 1) in the sequence modes.

    `old` and `sampling` are log-probabilities of the trained model and of vLLM. Where `counted` is 0,
    or vLLM's is NaN, there is no correction. Mode and bounds are TRL's settings.
    """
    mode = trainer.vllm_importance_sampling_mode
    low = trainer.vllm_importance_sampling_clip_min
    high = trainer.vllm_importance_sampling_clip_max
    difference = torch.where(counted.bool(), old - sampling, 0.0).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    factor = difference.exp()
    if mode.endswith("truncate"):
        return factor.clamp(min=low, max=high)
    outside = (factor < (-math.inf if low is None else low)) | (
        factor > (math.inf if high is None else high)
    )
    return factor.masked_fill(outside, 0.0)


def log(trainer: Any, ratio: torch.Tensor, difference: torch.Tensor, counted: torch.Tensor) -> None:
    """Log TRL's figures on the correction, over the tokens that all processes forwarded."""
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
