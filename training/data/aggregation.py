"""How TRL adds up the rewards of a completion, and which groups of completions have zero variance."""

from typing import Any

import torch
from trl.trainer.utils import nanstd


def equal_groups(trainer: Any, rewards: torch.Tensor) -> torch.Tensor:
    """Which groups have zero variance: (groups,) of bool, from rewards (completions, functions).

    The rewards of a completion are added up as TRL does by `multi_objective_aggregation`. Normalised
    apart, the rewards of a group can cancel out. A completion that no function scored is left out. So a
    group with fewer than two scored completions has zero variance.
    """
    weights, unscored = trainer.reward_weights.to(rewards.device), rewards.isnan().all(1)
    grouped = rewards.view(-1, trainer.num_generations, rewards.size(1))
    smallest = 1e-6
    if trainer.multi_objective_aggregation == "normalize_then_sum":
        mean, std = grouped.nanmean(1, keepdim=True), nanstd(grouped, dim=1, keepdim=True)
        varies = _spread(grouped).unsqueeze(1) >= smallest
        grouped = torch.where(varies, (grouped - mean) / (std + 1e-4), 0.0)
        smallest *= float(weights.abs().max())
    total = (grouped * weights).nansum(2).masked_fill(unscored.view(grouped.shape[:2]), torch.nan)
    return _spread(total.unsqueeze(2)).squeeze(1) <= smallest


def _spread(grouped: torch.Tensor) -> torch.Tensor:
    """The largest less the smallest value of each group, NaN left out: (groups, functions)."""
    missing = grouped.isnan()
    largest = grouped.masked_fill(missing, -torch.inf).amax(1)
    return largest - grouped.masked_fill(missing, torch.inf).amin(1)
