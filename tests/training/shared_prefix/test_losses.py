"""The recipes of losses: each trains as TRL's own pass does, and its options do what they are for."""

import configparser
import json

import pytest

from pipeline.config_files import read_overlay
from tests.conftest import LOSSES, ROOT
from tests.prefix_models import Drawn, apart, told, trainer, weights
from tests.training.shared_prefix.test_trainer import policy  # noqa: F401

# Steps that go far enough to clip. Of Adam's first steps rounding alone could turn the sign.
FAR = {"learning_rate": 0.05, "optim": "sgd", "max_steps": 2, "rows": 8}


def options_of(loss: str) -> dict:
    """The options of TRL that the recipe of a loss sets."""
    config = configparser.RawConfigParser()
    config.read_dict({"Train": {"trl": "{}", "rewards": "{}"}})
    read_overlay(config, ROOT / "training" / "recipes" / f"{loss}.cfg")
    return json.loads(config["Train"]["trl"])


@pytest.mark.model
@pytest.mark.parametrize("loss", LOSSES)
def test_two_steps_give_the_weights_of_trl(policy, tmp_path, loss):
    given = {**FAR, **options_of(loss), "drawn": Drawn()}
    ours = trainer(policy, tmp_path / "ours", **given)
    before = weights(ours)
    ours.train()
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    stock.train()
    assert apart(weights(ours), before) > 1e-3
    assert apart(weights(ours), weights(stock)) < 1e-5
    clipped = [
        told(one, "clip_ratio/region_mean" if loss != "cispo" else "cispo_clip_ratio")
        for one in (ours, stock)
    ]
    assert clipped[0] == pytest.approx(clipped[1], abs=1e-6)
    assert any(clipped[0]) == (loss == "gspo"), (
        "a first use is never clipped, and a weight of 5 is rare"
    )
