"""The largest batch of a run, taken before its first step: what it is, and that nothing of it is kept."""

from types import SimpleNamespace

import pytest
import torch

from tasks.runtime.errors import StageError
from tests import prefix_models
from tests.prefix_models import Largest, apart, told, trainer, weights
from tests.training.shared_prefix.test_runs import in_two_processes
from tests.training.test_grpo import arguments, curve, frozen, trained, weights_of
from training.resources import largest_batch

__all__ = ["frozen"]  # the fixture


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def sized(**given):
    """As much of a trainer as its batch's size is read from."""
    settings = {"tokens_per_micro_batch": 0, "max_completion_length": 100, "num_generations": 4}
    args = SimpleNamespace(per_device_train_batch_size=8)
    return SimpleNamespace(**{**settings, "way": "prefix", "args": args, **given})


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({}, 100),
        ({"tokens_per_micro_batch": 900}, 100),  # two prompts of 50 and eight completions
        ({"tokens_per_micro_batch": 450}, 100),  # a group
        ({"tokens_per_micro_batch": 700}, 75),  # two groups, shorter than one of the full length
        ({"tokens_per_micro_batch": 700, "way": "vision"}, 100),  # the logits of a group
        ({"tokens_per_micro_batch": 100}, 100),  # a row alone exceeds it
    ],
)
def test_micro_batches_are_as_full_as_their_bound_allows(given, length):
    assert largest_batch.fullest(sized(**given), 50) == length


@pytest.mark.model
@pytest.mark.parametrize(
    "given",
    [{"shared": True, "tokens": 80}, {"shared": False, "beta": 0.1}, {"shared": True, "beta": 0.1}],
    ids=["bounded", "stock", "whole"],
)
def test_a_run_ends_as_if_the_largest_batch_had_not_been(policy, tmp_path, capsys, given):
    ends = []
    for tried in (False, True):
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
        one = trainer(policy, tmp_path, **options, **given)
        if tried:
            largest = Largest(one)
            one.add_callback(largest)
        one.train()
        figures = {name: told(one, name) for name in ("loss", "reward", "num_tokens", "entropy")}
        counters = getattr(one, "counters", None)
        figures["tokens"] = counters and counters.lm_tokens
        figures["asked"] = len(one._logs["prompt"])
        ends.append((weights(one), figures))
    assert apart(ends[0][0], ends[1][0]) == 0
    assert ends[0][1] == ends[1][1]
    said = capsys.readouterr().out
    assert said.count("train: the largest batch, 8 completions of ") == 1
    assert "10 tokens" in said or "tokens" in given


@pytest.mark.model
def test_the_stage_takes_it_on_request_and_says_what_goes_on(frozen, tmp_path, monkeypatch, capsys):
    from tasks.runtime import progress
    from tasks.tables import shards

    words, say = [], progress.Bar.say
    monkeypatch.setattr(
        progress.Bar, "say", lambda self, word: (words.append(word), say(self, word))
    )
    given = arguments(frozen, steps=2, dynamic_sampling=1, watch_every=2)
    plain = trained(tmp_path / "plain", given)
    assert "the largest batch" not in capsys.readouterr().out
    tried = trained(tmp_path / "tried", {**given, "check_largest_batch": True})
    assert "train: the largest batch, 4 completions of 8 tokens" in capsys.readouterr().out
    assert weights_of(plain) == weights_of(tried)
    assert curve(plain) == curve(tried)
    said = [shards.read(folder, "completions").to_pylist() for folder in (plain, tried)]
    assert said[0] == said[1]
    assert {"generating", "checking", "rewarding", "updating", "saving", "watching val images"} == {
        *words
    }


@pytest.mark.model
def test_where_memory_runs_out_it_is_said_what_helps(policy, tmp_path, monkeypatch):
    one = trainer(policy, tmp_path)
    one.add_callback(Largest(one))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(one, "_compute_loss", full)
    with pytest.raises(
        StageError, match=r"16 completions of 10 tokens .* smaller .* micro_batch_size"
    ):
        one.train()


@pytest.mark.model
@pytest.mark.process
def test_two_processes_end_as_if_it_had_not_been(policy, tmp_path):
    names = ("shared", "tried", "stock", "triedstock")
    shared, tried, stock, tried_stock = in_two_processes(policy, tmp_path, *names)
    assert apart(shared, tried) == 0
    assert apart(stock, tried_stock) == 0
