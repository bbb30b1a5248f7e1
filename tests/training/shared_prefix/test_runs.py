"""Whole runs with shared prefixes: the weights of TRL, also in turns, with vLLM and in two processes."""

import subprocess
import sys
from collections import Counter

import pytest
import torch

from tests import prefix_models, stub_vllm
from tests.conftest import ROOT
from tests.prefix_models import (
    GROUP,
    Drawn,
    apart,
    some_dead,
    told,
    trainer,
    weights,
)
from tests.training.shared_prefix.test_trainer import as_trl, pair, policy, slot_of  # noqa: F401
from training.model.rollout_engine import RolloutEngine
from training.shared_prefix import (
    prompts_once,
)


@pytest.mark.model
def test_twenty_steps_give_the_weights_of_trl(policy, tmp_path):
    """Same seed, on the CPU: rewards equal, weights within 1e-4. The counters of the run."""
    given = {"max_steps": 20, "rows": 80, "reward": some_dead, "drawn": Drawn()}
    ours = trainer(policy, tmp_path / "ours", **given)
    images = Counter()
    real = ours.processing_class.image_processor
    spy = Spy(real, images)
    ours.processing_class.image_processor = spy
    ours.train()
    ours.processing_class.image_processor = real
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
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
    given = {"max_steps": 4, "rows": 16, "reward": some_dead, "drawn": Drawn(), **config}
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

    after, drawn = [], Drawn()
    for shared in (True, False):
        calls.clear()
        given = {"shared": shared, "reward": reward, "weight_decay": 0.1, "drawn": drawn}
        given["adam_epsilon"] = 1e-6  # else Adam blows rounding up to whole steps
        one = trainer(policy, tmp_path / str(shared), **given)
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
