"""Shared-prefix training: TRL's log-probabilities, gradients and weights, for less work."""

import dataclasses
import hashlib
import inspect
import subprocess
import sys
from collections import Counter

import pytest
import torch
import trl
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

from tasks.runtime.errors import StageError
from tests import prefix_models, stub_vllm
from tests.conftest import ROOT
from tests.prefix_models import (
    GROUP,
    apart,
    questions,
    some_dead,
    told,
    trainer,
    weights,
)
from training.model.rollout_engine import RolloutEngine
from training.shared_prefix import (
    attention,
    forward,
    packing,
    prompts_once,
)
from training.shared_prefix import (
    check as parity,
)
from training.shared_prefix.forward import packed, sharing
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


@pytest.mark.model
def test_twenty_steps_give_the_weights_of_trl(policy, tmp_path):
    """Same seed, on the CPU: rewards equal, weights within 1e-4. The counters of the run."""
    ours = trainer(policy, tmp_path / "ours", max_steps=20, rows=80, reward=some_dead)
    images = Counter()
    real = ours.processing_class.image_processor
    spy = Spy(real, images)
    ours.processing_class.image_processor = spy
    ours.train()
    ours.processing_class.image_processor = real
    stock = trainer(
        policy, tmp_path / "stock", shared=False, max_steps=20, rows=80, reward=some_dead
    )
    patches = Counter()
    stock.model.model.visual.register_forward_pre_hook(
        lambda _m, args, _k: patches.update(n=len(args[0]) * stock.model.training), with_kwargs=True
    )
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert len(told(ours, "reward")) == 20
    assert apart(weights(ours), weights(stock)) < 1e-4
    found = ours.counters
    assert found.groups == 80
    assert found.zero_advantage_groups > 20
    assert found.zero_advantage_groups_forwarded == 0
    ideal_saving = found.lm_tokens_stock - found.lm_tokens_ideal
    assert found.lm_tokens_stock - found.lm_tokens >= 0.98 * ideal_saving > 0
    assert found.completion_tokens_useful >= 0.95 * found.completion_tokens_forwarded
    assert found.image_processor_calls <= found.unique_images == 80
    assert max(images.values()) == 1
    assert told(ours, "shared/useful_share") == [1.0] * 20
    assert sum(told(ours, "shared/groups")) == 80


class Spy:
    """An image processor that counts how often it was given each picture."""

    def __init__(self, real, seen):
        self.real, self.seen = real, seen

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, images, *args, **kwargs):
        self.seen.update(image.tobytes() for image in prompts_once._flat(images))
        return self.real(images, *args, **kwargs)


@pytest.mark.model
def test_an_image_is_encoded_once_a_group(policy, tmp_path):
    ours, stock = pair(policy, tmp_path)
    slot = slot_of(ours)
    seen = {}
    for one, turn in ((ours, slot), (stock, as_trl(ours, slot))):
        count = seen[one] = Counter()
        one.model.model.visual.register_forward_pre_hook(
            lambda _m, args, _k, count=count: count.update(n=len(args[0])), with_kwargs=True
        )
        one._compute_loss(one.model, turn)
    ours._unchecked = False
    seen[ours].clear()
    ours._compute_loss(ours.model, slot)
    assert seen[ours]["n"] * GROUP == seen[stock]["n"]


@pytest.mark.model
@pytest.mark.parametrize(
    "config",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    ],
)
def test_training_in_turns_gives_the_weights_of_trl(policy, tmp_path, config):
    given = {"max_steps": 4, "rows": 16, "reward": some_dead, **config}
    ours = trainer(policy, tmp_path / "ours", tokens=100, **given)
    passes = without_gradient(ours)
    ours.train()
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    # With iterations over one batch the first turn finds the old log-probabilities by itself.
    assert not passes


def without_gradient(trainer):
    """A list that grows with each forward pass of the trainer's that is for values only."""
    passes, forward = [], trainer._forward

    def watched(*args):
        if not torch.is_grad_enabled():
            passes.append(1)
        return forward(*args)

    trainer._forward = watched
    return passes


@pytest.mark.model
def test_old_log_probabilities_take_a_pass_where_weights_change_in_between(policy, tmp_path):
    ours = trainer(policy, tmp_path, steps_per_generation=2, per_device_train_batch_size=8)
    passes = without_gradient(ours)
    ours.train()
    assert len(passes) == 2  # one for each micro-batch of the one generation


@pytest.mark.model
@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_the_correction_for_vllm_is_that_of_trl_without_a_pass_of_its_own(
    policy, tmp_path, monkeypatch, mode
):
    """A vLLM whose log-probabilities are a little off; micro-batches, and two iterations."""
    monkeypatch.setattr(RolloutEngine, "_init_vllm", stub_vllm.start)
    given = {"max_steps": 4, "rows": 16, "reward": some_dead, "num_iterations": 2, "use_vllm": True}
    given |= {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    found = []
    for shared in (True, False):
        one = trainer(policy, tmp_path / str(shared), shared=shared, tokens=100, **given)
        one.vllm_generation.llm.noise = 0.05
        passes = without_gradient(one) if shared else None
        one.train()
        found.append(one)
    ours, stock = found
    assert not passes
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    assert ours.vllm_generation.llm.loaded > 0
    for figure in ("sampling_logp_difference/mean", "importance_sampling_ratio/max"):
        assert told(ours, f"sampling/{figure}")  # over forwarded tokens, where TRL has all


@pytest.mark.model
def test_a_batch_without_any_advantage_moves_the_weights_as_with_trl(policy, tmp_path):
    """By momentum and decay alone."""
    calls = Counter()

    def reward(completions, **_):
        calls.update(n=1)
        return prefix_models.spread(completions) if calls["n"] == 1 else [1.0] * len(completions)

    after = []
    for shared in (True, False):
        calls.clear()
        one = trainer(
            policy, tmp_path / str(shared), shared=shared, reward=reward, weight_decay=0.1
        )
        one.train()
        after.append(weights(one))
        if shared:
            assert one.counters.zero_advantage_groups == 4
    assert apart(*after) < 1e-5


@pytest.mark.model
def test_equal_seeds_give_equal_bits_and_so_does_going_on(policy, tmp_path):
    """A run, the same again, and one that goes on from a checkpoint in the middle."""
    from transformers import AutoModelForImageTextToText

    given = {"max_steps": 4, "rows": 16, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(policy, tmp_path / "whole", **given)
    whole.train()
    again = trainer(policy, tmp_path / "again", **given)
    again.train()
    assert apart(weights(whole), weights(again)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert "shared_prefix" not in (checkpoint / "config.json").read_text()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    rest = trainer(policy, tmp_path / "rest", model=model, **given)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert apart(weights(whole), weights(rest)) == 0


def in_two_processes(policy, folder, *kinds):
    """The weights after training in two processes, in each of these ways."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         "-m", "tests.prefix_models", str(policy), str(folder), *kinds],
        cwd=ROOT, check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    return [torch.load(folder / f"{kind}.pt") for kind in kinds]


@pytest.mark.model
@pytest.mark.process
def test_two_processes_give_the_weights_of_trl(policy, tmp_path):
    """Processes with different numbers of groups to forward, one of them with none."""
    assert apart(*in_two_processes(policy, tmp_path, "shared", "stock")) < 1e-4


@pytest.mark.model
@pytest.mark.process
def test_a_process_without_a_gradient_takes_part_where_weights_are_shared_out(policy, tmp_path):
    """Every vision block and layer is gathered from both processes, of which one has no advantage."""
    assert apart(*in_two_processes(policy, tmp_path, "shared", "sharded")) < 1e-6


# What may go wrong.


def no_positions(monkeypatch):
    """Tokens of a completion stand behind one another, wherever their prompt ended."""
    monkeypatch.setattr("training.shared_prefix.forward._positions", lambda *_: None)


def one_further(monkeypatch):
    """Completions begin one position too late."""
    right = forward._positions

    def wrong(module, rows, chosen, pack):
        ahead = (pack.label >= 0).long()
        return right(module, rows, chosen, pack) + ahead[None, None]

    monkeypatch.setattr(forward, "_positions", wrong)


def leaking(monkeypatch):
    """The branches of a group are one: a completion sees those before it."""
    right = packing.Packed.layout

    def wrong(pack, device):
        spans = [attention.Span(s.start, s.prefix, (sum(s.branches),)) for s in pack.spans]
        return right(dataclasses.replace(pack, spans=spans), device)

    monkeypatch.setattr(packing.Packed, "layout", wrong)


@pytest.mark.model
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fault", [no_positions, one_further, leaking])
def test_a_fault_of_the_shared_pass_is_told_and_training_goes_on_with_trls(
    policy, tmp_path, monkeypatch, capsys, fault, bf16
):
    fault(monkeypatch)
    given = {"bf16": bf16, "tokens": 60, "max_steps": 2, "num_iterations": 2, "beta": 0.3}
    ours = trainer(policy, tmp_path / "wrong", **given)
    ours.train()
    assert "warning: shared and separate forward passes disagree" in capsys.readouterr().out
    assert ours.falls_back
    assert ours.counters.completion_tokens_forwarded > 0
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    stock.train()
    assert apart(weights(ours), weights(stock)) < (1e-3 if bf16 else 1e-5)


@pytest.mark.model
def test_rounding_of_a_deep_net_in_16_bits_is_no_fault_and_half_a_nat_is(tmp_path, monkeypatch):
    """Eight random layers part by more than a tenth of a nat at the worst token."""
    deep = prefix_models.write_policy(tmp_path / "deep", layers=8)
    model = AutoModelForImageTextToText.from_pretrained(deep, dtype=torch.bfloat16)
    one = trainer(deep, tmp_path / "a", model=model, bf16=True, max_completion_length=40)
    rows = one._rows(slot := slot_of(one), slot["groups"])
    assert parity.agree(one, one.model, rows)
    right = parity.packed

    def shifted(*given):
        found = right(*given)
        return dataclasses.replace(found, logps=found.logps + 0.5)

    monkeypatch.setattr(parity, "packed", shifted)
    assert not parity.agree(one, one.model, rows)


@pytest.mark.model
def test_the_comparison_takes_two_rows_a_group_and_passes_over_a_full_memory(
    policy, tmp_path, monkeypatch, capsys
):
    one = trainer(policy, tmp_path / "a")
    rows = one._rows(slot := slot_of(one), slot["groups"])
    taken = []
    right = parity.packed

    def packed(model, rows, own):
        taken.append([rows.groups[row] for row in own])
        return right(model, rows, own)

    monkeypatch.setattr(parity, "packed", packed)
    assert parity.agree(one, one.model, rows)
    assert [Counter(groups) for groups in taken] == [{0: 2, 1: 2}]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    capsys.readouterr()
    monkeypatch.setattr(parity, "padded", full)
    assert parity.agree(one, one.model, rows)
    assert "not enough memory to compare" in capsys.readouterr().out


@pytest.mark.model
def test_the_first_batch_is_checked_unless_told_not_to(policy, tmp_path, capsys):
    after = []
    for check in (True, False):
        one = trainer(policy, tmp_path / str(check), check=check)
        one.train()
        assert ("agree on the first batch" in capsys.readouterr().out) == check
        after.append(weights(one))
    assert apart(*after) == 0


@pytest.mark.model
def test_what_can_be_shared_is_found_from_the_model(policy, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    assert sharing(model)[0] == "prefix"
    trainer(policy, tmp_path / "a", model=model)
    assert "go through the model once a group (qwen2_5_vl)" in capsys.readouterr().out
    eager = AutoModelForImageTextToText.from_pretrained(policy, attn_implementation="eager")
    assert sharing(eager) == (
        "vision", "qwen2_5_vl with attention eager; a shared prefix needs sdpa, all full"
    )  # fmt: skip
    eager.__class__.base_model = property(lambda _: torch.nn.Module())
    try:
        assert sharing(eager) == ("none", "qwen2_5_vl has no get_image_features")
    finally:
        del eager.__class__.base_model


@pytest.mark.model
def test_settings_that_do_not_go_together_are_refused(policy, tmp_path):
    with pytest.raises(StageError, match="tokens_per_micro_batch does not go with"):
        trainer(policy, tmp_path, tokens=100, entropy_coef=0.1)
