"""The options of `[Train] trl` are checked against TRL's own fields before a model is loaded."""

import inspect
import typing
from pathlib import Path

import pytest

from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from training import trl_options
from training.settings import TrainSettings
from training.trl_options import TRL_RULES


@pytest.mark.parametrize(
    ("trl", "says"),
    [
        ({"lr_scheduler_type": "linaer"}, "lr_scheduler_type must be linear, cosine, .*got 'linaer'"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs must be an object or a text or null; got 3"),
        ({"optim": "adamm"}, "optim must be adamw_torch, .*got 'adamm'"),
        ({"gradient_checkpointing": "true"}, "gradient_checkpointing must be true or false; got 'true'"),
        ({"use_vllm": 1}, "use_vllm must be true or false; got 1"),
        ({"delta": "1"}, "delta must be a number or null; got '1'"),
        ({"log_level": "loud"}, "log_level must be .*; got 'loud'"),
        ({"vllm_server_port": "8000"}, "vllm_server_port must be a whole number; got '8000'"),
    ],
)  # fmt: skip
def test_a_value_that_trl_does_not_take_is_refused_by_its_key(tmp_path, trl, says):
    from training.loop.trl_settings import grpo_config

    settings = settings_of(TrainSettings, trl={"use_cpu": True, **trl})
    with pytest.raises(StageError, match=rf"^\[Train\] trl: {says}"):
        grpo_config(tmp_path, settings, total_steps=1, seed=0)


def test_the_supervised_baseline_checks_the_options_that_it_takes(tmp_path):
    from training.loop.trl_settings import sft_config

    settings = settings_of(TrainSettings, trl={"use_cpu": True, "gradient_checkpointing": "yes"})
    with pytest.raises(StageError, match="gradient_checkpointing must be true or false"):
        sft_config(tmp_path, settings, total_steps=1, seed=0)


def test_the_rules_that_are_known_without_trl_agree_with_it():
    from trl import GRPOConfig, GRPOTrainer

    kinds = typing.get_type_hints(GRPOConfig)
    source = Path(inspect.getfile(GRPOTrainer)).read_text(encoding="utf-8")
    help_texts = {name: GRPOConfig.__dataclass_fields__[name].metadata for name in TRL_RULES}
    for name, (kind, rule) in TRL_RULES.items():
        assert kinds[name] == kind, name
        default = GRPOConfig.__dataclass_fields__[name].default
        assert default is None or rule.refusal(default) is None, name
        for word in rule.choices:
            known = f'"{word}"' in source or f"`'{word}'`" in help_texts[name]["help"]
            assert known, (name, word)


def test_every_loss_of_trl_is_a_choice():
    from trl import GRPOTrainer

    source = Path(inspect.getfile(GRPOTrainer)).read_text(encoding="utf-8")
    compared = [line for line in source.splitlines() if "self.loss_type in [" in line]
    words = {
        word for line in compared for word in line.split("[")[1].split("]")[0].split('"')[1::2]
    }
    assert words
    assert words <= set(TRL_RULES["loss_type"][1].choices)


def test_the_names_that_are_read_without_trl_are_those_of_its_configurations():
    from trl import GRPOConfig, SFTConfig

    names = {*GRPOConfig.__dataclass_fields__, *SFTConfig.__dataclass_fields__}
    assert trl_options.known() - names == {"Parameters", "else"}, "words of docstrings"
    assert names <= trl_options.known()
    assert names >= trl_options.OURS


@pytest.mark.parametrize(
    ("trl", "says"),
    [
        ({"betta": 0.1}, "TRL has no option 'betta'; did you mean beta?"),
        ({"qqqqqqqq": 0.1}, "TRL has no option 'qqqqqqqq'"),
        ({"max_steps": 3}, "'max_steps' is set by another key of [Train]"),
        ({"beta": -1.0}, "beta must be at least 0; got -1.0"),
        ({"beta": 0.1, "scale_rewards": False, "lr_scheduler_type": "cosine"}, ""),
    ],
)
def test_an_option_that_cannot_be_used_is_known_without_trl(trl, says):
    assert trl_options.problem(trl) == says
