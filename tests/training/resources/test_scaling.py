"""What keeps a run's hours from falling with more GPUs, worked out by hand."""

import pytest

from pipeline.cli import plan
from pipeline.settings import SettingsError
from tests.pipeline.cli.test_plan import recipe  # noqa: F401  a fixture
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed
from training.resources import scaling


def test_what_does_not_scale_is_named_in_hours(recipe):
    recipe("[run]\nrounds = 1\n[Propose]\nshard_size = 100\n[Split]\npretrain_share = 0\n")
    estimates = plan.Estimates(
        tokens_per_second=800, gpus=8, answer_tokens=10, images=100_000, scale=(1, 8, 512),
        engine_start=36, download_rate=1000,
    )  # fmt: skip
    found = plan.plan("beetles", "dive_k", 0, estimates)
    one, eight, many = found["scale"]
    assert [row["gpus"] for row in found["scale"]] == [1, 8, 512]
    for row in found["scale"]:
        assert sum(row["stages"].values()) == pytest.approx(sum(row["causes"].values()))
        assert row["causes"]["one machine"] >= 100 / 3600
    # 100 tokens a second and GPU; 360 shards of 100 images, 20 answers and 10 tokens each.
    propose, shard = "Propose dive_k 0", 100 * 20 * 10 / 100 / 3600
    assert one["stages"][propose] == pytest.approx(360 * shard + 0.01)
    assert eight["stages"][propose] == pytest.approx(45 * shard + 0.01)
    assert many["stages"][propose] == pytest.approx(shard + 0.01), "152 engines have no shard"
    # 192 completions a step: no more than so many GPUs have one.
    train = "Train dive_k 0"
    assert many["stages"][train] == pytest.approx(0.01 + 20 * 10 / 100 / 3600)
    assert "100 shards a pass for 512 engines" in many["first"]


def test_a_scale_without_rates_is_refused(recipe):
    recipe("")
    with pytest.raises(SettingsError, match="--tokens-per-second and --gpus"):
        plan.plan("beetles", "dive_k", 0, plan.Estimates(scale=(8,), tokens_per_second=10))


def test_the_ring_of_an_all_reduce_costs_its_bytes_twice_almost():
    share = scaling.Share("Train", 0, 0, units=64, passes=10, gradients=3e9, trains=True)
    rates = scaling.Rates(1.0, reduced=1e9)
    costs = [scaling.seconds(share, gpus, rates)["all-reduce"] for gpus in (1, 2, 64, 512)]
    assert costs == pytest.approx([0, 30, 10 * 2 * 63 / 64 * 3, 10 * 2 * 63 / 64 * 3])
