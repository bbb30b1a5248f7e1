"""Rewards that are normalised apart (`normalize_then_sum`): TRL's own numbers, also with what we add."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tasks.tables import shards
from tests import prefix_models
from tests.training.test_grpo import arguments, frozen, trained  # noqa: F401
from training.data.aggregation import equal_groups
from training.loop.sampling import with_ours

pytestmark = pytest.mark.model

WAYS = ("sum_then_normalize", "normalize_then_sum")
WEIGHTS = [1.0, 0.5, -0.5]
COUNT, GROUP = 4, prefix_models.GROUP
NAN = float("nan")
# The rewards of a group's four completions by each of three functions.
ALIKE = [[0.37, 1.0, NAN]] * 4
UNSCORED = [[NAN] * 3] * 4
ONE = [[1.0, NAN, NAN], *[[NAN] * 3] * 3]
CANCELLED = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]] * 2
RARE = [[1.0, 1.0, 0.0]] * 3 + [[1.0, 0.0, 0.0]]
PARTLY = [[1.0, NAN, 0.3], [0.0, 1.0, NAN], [NAN] * 3, [1.0, 0.0, 0.7]]


class Paying:
    """A trainer whose three reward functions pay what `rewards` says, (completions, functions)."""

    def __init__(self, policy, folder, way: str, shared: bool, ours: bool, weights=WEIGHTS):
        self.rewards: list[list[float]] = []
        functions = [self._function(number) for number in range(3)]
        given: dict[str, Any] = {"multi_objective_aggregation": way, "reward_weights": weights}
        given |= {"reward": functions, "shared": shared}
        if ours:
            given["mixed"] = lambda kind: with_ours(kind, truth_rollout=False)
        self.trainer = prefix_models.trainer(policy, folder, **given)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        # Advantages follow from the rewards alone, whatever was said.
        said = lambda prompt_ids, *_, **__: ([[20, 2] for _ in prompt_ids], None)  # noqa: E731
        self.trainer._generate_single_turn = said
        self.rows = [row for row in prefix_models.questions(COUNT) for _ in range(GROUP)]

    def _function(self, number: int):
        def paid(completions, **_):
            values = [row[number] for row in self.rewards]
            return [None if value != value else value for value in values]

        paid.__name__ = f"paid{number}"
        return paid

    def batch(self, groups: list[list[list[float]]]) -> dict[str, Any]:
        self.rewards = [row for group in groups for row in group]
        return self.trainer._generate_and_score_completions(self.rows)

    def advantages(self, groups: list[list[list[float]]]) -> torch.Tensor:
        """(groups, completions)"""
        return self.batch(groups)["advantages"].view(-1, GROUP)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def drawn(random_: random.Random) -> list[list[float]]:
    """A group's rewards as ours are: a few values, some missing."""
    values = [0.0, 1.0, 0.5, 0.37, NAN]
    return [random_.choices(values, k=3) for _ in range(GROUP)]


@pytest.mark.parametrize("way", WAYS)
def test_zero_variance_groups_are_those_to_which_trl_gives_no_advantage(policy, tmp_path, way):
    theirs = Paying(policy, tmp_path, way, shared=False, ours=False)
    generator = random.Random(0)
    batches = [[RARE, ALIKE, CANCELLED, PARTLY], [UNSCORED, ONE, RARE, ALIKE]]
    batches += [[RARE, *(drawn(generator) for _ in range(3))] for _ in range(30)]
    seen = []
    for groups in batches:
        advantages = theirs.advantages(groups)
        found = equal_groups(theirs.trainer, torch.tensor(groups).view(-1, 3)).tolist()
        assert found == (advantages.abs().amax(1) < 1e-3).tolist(), groups
        seen += found
    assert {*seen} == {True, False}
    assert equal_groups(theirs.trainer, torch.tensor(batches[0]).view(-1, 3)).tolist() == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
def test_our_advantages_are_those_of_trl_without_its_rounding(policy, tmp_path, shared):
    way = "normalize_then_sum"
    theirs = Paying(policy, tmp_path / "theirs", way, shared=False, ours=False)
    ours = Paying(policy, tmp_path / "ours", way, shared=shared, ours=True)
    generator, rounded = random.Random(1), 0
    for _ in range(20):
        groups = [RARE, ALIKE, drawn(generator), drawn(generator)]
        expected, batch = theirs.advantages(groups), ours.batch(groups)
        found = batch["advantages"].view(-1, GROUP)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        dead = equal_groups(ours.trainer, torch.tensor(groups).view(-1, 3))
        assert not found[dead].any()
        rounded += int(expected[dead].any())
        logged = list(ours.trainer._logs["advantages"])[-COUNT * GROUP :]
        assert logged == batch["advantages"].tolist()
        assert ours.trainer._metrics["train"]["dead_groups"] == [dead.float().mean().item()]
        if shared:
            slot = ours.trainer._slot(batch, range(COUNT * GROUP))
            assert slot["counted"]["zero_advantage_groups"] == dead.sum()
            assert slot["counted"]["zero_advantage_groups_forwarded"] == 0
    assert rounded, "else the test shows nothing"


def test_where_no_group_has_a_variance_nothing_is_learned_from_rounding(policy, tmp_path):
    """TRL divides rounding by the rounding's own standard deviation."""
    apart = [[[value, 1.0, 0.0]] * GROUP for value in (0.7, 0.9, 0.1, 0.3)]
    noise = [[[0.1 + 0.2, 1.0, 0.0], *[[0.3000002, 1.0, 0.0]] * 3], *apart[1:]]
    way = "normalize_then_sum"
    theirs = Paying(policy, tmp_path / "theirs", way, shared=False, ours=False)
    ours = Paying(policy, tmp_path / "ours", way, shared=True, ours=True)
    assert theirs.advantages(noise).abs().max() > 0.5
    assert not ours.advantages(noise).any()


@pytest.mark.parametrize("shared", [True, False])
def test_our_rewards_are_normalised_apart_in_training(frozen, tmp_path, shared):
    """Against TRL's formula, with the truth among the completions and further questions."""
    weights = {"format": 1.0, "letter": 1.0, "think_length": 0.5, "tests.paid:by_length": 0.1}
    options = {"beta": 0.0, "use_cpu": True, "multi_objective_aggregation": "normalize_then_sum"}
    given = arguments(frozen, truth_rollout=True, steps=2, rewards=weights, trl=options)
    given |= {"think_target": 1, "think_limit": 9, "dynamic_sampling": 1}
    given |= {"max_completion_length": 32, "shared_prefix": shared}
    folder = trained(tmp_path / "out", given)
    rows = shards.read(folder, "completions").to_pylist()
    by_step = {step: [row for row in rows if row["step"] == step] for step in (1, 2)}
    for of_step in by_step.values():
        batch = of_step[:8]  # then those that were replaced
        paid = np.array([[row[f"reward/{name}"] for name in weights] for row in batch])
        grouped = paid.reshape(2, 4, -1)
        spread = grouped.std(1, keepdims=True, ddof=1) + 1e-4
        summed = (
            ((grouped - grouped.mean(1, keepdims=True)) / spread) @ [*weights.values()]
        ).ravel()
        expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
        assert [row["advantage"] for row in batch] == pytest.approx(expected, abs=1e-4)
        for truth in batch[3::4]:
            assert truth["reward/letter"] == truth["reward/format"] == 1.0
            assert 0 < truth["reward/think_length"] < 1, "it thinks in a sentence"
            assert truth["advantage"] > 0
        wrong = [row["reward/think_length"] for row in batch if not row["reward/letter"]]
        assert wrong
        assert set(wrong) == {0.0}
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["dead_group_share"] == 0.0
        parts = sum(w * row[f"reward/{name}"] for name, w in weights.items())
        assert row["reward"] == pytest.approx(parts, abs=1e-5)
