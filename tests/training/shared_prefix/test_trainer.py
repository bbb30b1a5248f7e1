"""Shared-prefix training: TRL's log-probabilities, gradients and weights, for less work."""

import hashlib
import inspect

import pytest
import torch
import trl
from trl import GRPOTrainer

from tests import prefix_models
from tests.prefix_models import (
    GROUP,
    questions,
    trainer,
)
from training.shared_prefix.forward import packed
from training.shared_prefix.trainer import SharedPrefixTrainer

LOSSES = ["dapo", "grpo", "dr_grpo", "bnpo"]
# The methods of TRL that the trainer overrides, or on whose insides it relies.
TRL_SOURCES = {
    "_prepare_inputs": "f824e7fb0714",
    "_tokenize_prompts": "d2d27f7c9bfd",
    "_generate": "2a27fdf8f5e6",
    "_generate_single_turn": "e0f02e4fc094",
    "_generate_and_score_completions": "1fa48922792d",
    "_get_per_token_logps_and_entropies": "ea73c3909275",
    "_compute_loss": "80295546bbdb",
    "training_step": "9e18632f7dd8",
    "log": "1e7772819cc8",
}


def test_trl_is_the_version_whose_insides_are_overridden():
    """A new TRL needs the trainer read against it; then put the new digests here."""
    assert trl.__version__ == "1.16.0"
    found = {
        name: hashlib.sha256(inspect.getsource(getattr(GRPOTrainer, name)).encode()).hexdigest()[
            :12
        ]
        for name in TRL_SOURCES
    }
    assert found == TRL_SOURCES


# What a batch comes to, beside TRL's own.


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def lora(**changed):
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "qkv"], **changed
    )


def wake(trainer):
    """LoRA's second matrices start at zero, where half of the gradients vanish."""
    torch.manual_seed(5)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)


def slot_of(trainer, count=4, dead=(), seed=0):
    """A generated batch as one turn of the loss: ragged completions, some groups without advantage."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in questions(count) for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(rows)
    draw = torch.Generator().manual_seed(seed)
    width = batch["completion_ids"].size(1)
    lengths = torch.randint(1, width + 1, (len(rows), 1), generator=draw)
    batch["completion_mask"] = (torch.arange(width)[None] < lengths).long()
    batch["completion_ids"] = batch["completion_ids"] * batch["completion_mask"]
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["advantages"] = torch.randn(len(rows), generator=draw)
    for group in dead:
        batch["advantages"][group * GROUP : (group + 1) * GROUP] = 0
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        if key in batch:  # as if the policy had moved since
            noise = torch.randn(batch[key].shape, generator=draw)
            batch[key] = (batch[key] + 0.3 * noise) * batch["completion_mask"]
    return trainer._slot(batch, range(len(rows)))


def as_trl(trainer, slot):
    """The same turn as TRL's own code takes it: an image for each row."""
    rows = trainer._rows(slot, slot["groups"])
    return {**slot, **rows.by_row(range(len(slot["groups"])))}


def gradients(trainer, loss):
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def same_gradients(trainer, stock, slot, bound=1e-5):
    """Loss and gradients of a turn, here and by TRL's own trainer; gives both."""
    ours = trainer._compute_loss(trainer.model, slot)
    mine = gradients_after(trainer, ours)
    theirs = GRPOTrainer._compute_loss(stock, stock.model, as_trl(trainer, slot))
    other = gradients(stock, theirs)
    norm = torch.cat([g.flatten() for g in other.values()]).norm()
    assert norm > 0
    assert abs(ours.item() - theirs.item()) < bound
    for name, gradient in other.items():
        assert float((mine[name] - gradient).abs().max()) < bound * max(1.0, float(norm)), name
    return mine, other


def gradients_after(trainer, loss):
    """Those of a loss whose first micro-batches went backward while it was computed."""
    loss.backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad(set_to_none=True)
    return found


def pair(policy, tmp_path, **given):
    """A trainer and TRL's, on equal weights."""
    ours = trainer(policy, tmp_path / "ours", **given)
    given = {k: v for k, v in given.items() if k not in ("tokens", "check")}
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    for one in (ours, stock):
        one.current_gradient_accumulation_steps = 1
        one.model.train()
    assert isinstance(ours, SharedPrefixTrainer)
    assert type(stock) is GRPOTrainer
    return ours, stock


@pytest.mark.model
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_are_those_of_trl(policy, tmp_path, tuning, checkpointing):
    """fp32, ragged completions, several groups: within 1e-5."""
    given = {"peft_config": lora()} if tuning == "lora" else {}
    ours, stock = pair(policy, tmp_path, gradient_checkpointing=checkpointing, beta=0.1, **given)
    for one in (ours, stock):
        wake(one)
    slot = slot_of(ours)
    rows = ours._rows(slot, slot["groups"])
    found = packed(ours.model, rows, range(len(rows.groups)))
    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        stock, stock.model, rows.input_ids, rows.attention_mask, rows.keep, compute_entropy=True,
        **rows.by_row(range(len(rows.groups))),
    )  # fmt: skip
    counted = slot["completion_mask"].flatten().nonzero().squeeze(1)
    assert torch.equal(found.place.sort().values, counted)
    assert float((logps.flatten()[found.place] - found.logps).detach().abs().max()) < 1e-5
    assert float((entropies.flatten()[found.place] - found.entropies).detach().abs().max()) < 1e-5
    same_gradients(ours, stock, slot)


@pytest.mark.model
def test_every_loss_and_every_way_to_split_it_has_the_gradient_of_trl(policy, tmp_path):
    """Groups without advantage count in the norm of the loss, and are not forwarded."""
    ours, stock = pair(policy, tmp_path)
    slot = slot_of(ours, dead=(1,))
    old = slot["advantages"].new_full(slot["completion_mask"].shape, -5.0)
    for loss in LOSSES:
        for tokens in (0, 60):
            for seen in (slot, {**slot, "old_per_token_logps": old}):
                ours.loss_type = stock.loss_type = loss
                ours.tokens_per_micro_batch = tokens
                rows = ours._rows(slot, slot["groups"])
                live = [r for r, group in enumerate(rows.groups) if group != 1]
                turn = {**seen, "micro_batches": ours._micro_batches(rows, live)}
                assert len(turn["micro_batches"]) == (1 if tokens == 0 else 3)
                ours._metrics["train"].clear()
                stock._metrics["train"].clear()
                same_gradients(ours, stock, turn)
                for name in ("clip_ratio/region_mean", "clip_ratio/low_min"):
                    one, other = (t._metrics["train"][name] for t in (ours, stock))
                    assert one == pytest.approx(other, abs=1e-6)
    assert ours.counters.zero_advantage_groups_forwarded == 0


@pytest.mark.model
def test_a_group_without_advantage_is_forwarded_for_the_sake_of_the_kl_term(policy, tmp_path):
    ours, stock = pair(policy, tmp_path, beta=0.5)
    slot = slot_of(ours, dead=(0, 1, 2, 3))
    mine, _ = same_gradients(ours, stock, slot)  # whose norm is not zero
    assert any(gradient.any() for gradient in mine.values())
    assert ours.counters.zero_advantage_groups_forwarded == 4
    for one in (ours, stock):
        one._metrics["train"].clear()
    same_gradients(ours, stock, slot)
    for name in ("kl", "entropy"):
        one, other = (t._metrics["train"][name] for t in (ours, stock))
        assert one == pytest.approx(other, abs=1e-5)


# What a run comes to.


# What may go wrong.
