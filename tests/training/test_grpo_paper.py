"""What the recipes of the published runs compute, against the formula of the GRPO paper."""

import pytest
import torch
from trl import GRPOTrainer

from tests import prefix_models


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def gradients(policy, folder, corrected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of TRL's loss and of the paper's (arXiv 2402.03300, equations 3 and 4), away from the reference."""
    beta = 0.04
    one = prefix_models.trainer(
        policy, folder, shared=False, beta=beta, use_bias_correction_kl=corrected,
        loss_type="grpo", scale_rewards="group",
    )  # fmt: skip
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in one.model.parameters():
            spread = weight.std(correction=0)
            weight.add_(0.1 * spread * torch.randn(weight.shape, generator=draws))
    one.model.train()
    one.current_gradient_accumulation_steps = 1
    batch = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    one.compute_loss(one.model, batch).backward()
    theirs = collected(one.model)
    names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    logps, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        one,
        one.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].size(1),
        **{name: batch[name] for name in names},
    )
    mask, advantage = batch["completion_mask"], batch["advantages"][:, None]
    ratio = (logps - logps.detach()).exp()
    gain = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    apart = batch["ref_per_token_logps"] - logps
    objective = gain - beta * (apart.exp() - apart - 1)
    (-((objective * mask).sum(1) / mask.sum(1)).mean()).backward()
    return theirs, collected(one.model)


def collected(model: torch.nn.Module) -> torch.Tensor:
    """All gradients in one row, taken out of the model."""
    found = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    model.zero_grad()
    return found


@pytest.mark.model
def test_the_gradient_is_the_papers_with_the_corrections_of_trl_off(policy, tmp_path):
    """And is not with them on, as they are where nobody says so."""
    off, paper = gradients(policy, tmp_path / "off", False)
    assert (off - paper).norm() < 1e-5 * paper.norm()
    on, paper = gradients(policy, tmp_path / "on", True)
    assert (on - paper).norm() > 1e-4 * paper.norm()
