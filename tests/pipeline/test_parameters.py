"""Every closed choice and every bound of luigi.cfg: refused in one sentence before a stage has run."""

import os
import subprocess
import sys

import luigi
import pytest
from luigi.task_register import Register

from pipeline.settings import SettingsError, check_configuration, known_keys
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401  a fixture

UNBOUNDED = {("Propose", "solved_at")}  # a mean reward, which may be any number


def ruled():
    """(section, key, rule) of every setting."""
    for section, keys in known_keys().items():
        for key, parameter in keys.items():
            if (rule := getattr(parameter, "rule", None)) is not None:
                yield section, key, parameter, rule


def wrong_words():
    for section, key, _, rule in ruled():
        if rule.choices:
            yield pytest.param(section, key, rule.choices, id=f"{section}.{key}")


def beyond():
    for section, key, parameter, rule in ruled():
        step = 1 if parameter.kind is int else 0.001
        limits = [(rule.at_least, -step), (rule.at_most, step), (rule.above, 0)]
        for limit, by in limits:
            if limit is not None:
                value = parameter.kind(limit + by)
                yield pytest.param(section, key, value, id=f"{section}.{key}={value}")


def refused(config, section, key, value) -> str:
    """What is said of a value, as soon as the first task is made; one sentence."""
    config.set(section, key, str(value))
    with pytest.raises(SettingsError) as caught:
        Register.get_task_cls("TrainDiVE")(dataset="beetles")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("section", "key", "choices"), wrong_words())
def test_a_wrong_word_is_refused_with_the_right_ones(config, section, key, choices):
    said = refused(config, section, key, "wrongly")
    assert said.startswith(f"error: luigi.cfg: section [{section}] {key} must ")
    assert said.endswith("got 'wrongly'")
    assert all(word in said for word in choices)


@pytest.mark.parametrize(("section", "key", "value"), beyond())
def test_a_number_out_of_bounds_is_refused_with_the_bound(config, section, key, value):
    said = refused(config, section, key, value)
    assert said.startswith(f"error: luigi.cfg: section [{section}] {key} must be ")
    assert said.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("key", "value", "twice"),
    [
        ("trl", '{"beta": "0.05", "use_cpu": true, "beta": 0.05}', "beta"),
        ("trl", '{"lr_scheduler_kwargs": {"rate": 1, "rate": 2}}', "rate"),
        ("rewards", '{"format": 1, "exact": 1, "format": 2}', "format"),
    ],
)
def test_a_key_that_stands_twice_in_an_object_is_refused(config, key, value, twice):
    config.set("Train", key, value)
    says = rf"luigi.cfg: section \[Train\] {key} has the key '{twice}' twice; delete one"
    with pytest.raises(SettingsError, match=says):
        check_configuration()


def test_every_number_has_a_bound_and_every_parameter_a_rule():
    for section, keys in known_keys().items():
        for key, parameter in keys.items():
            if (
                parameter is None
                or section == "Compare"
                or isinstance(parameter, luigi.ListParameter)
            ):
                continue
            rule = getattr(parameter, "rule", None)
            assert rule is not None, f"[{section}] {key} is declared without a setting"
            if parameter.kind in (int, float) and (section, key) not in UNBOUNDED:
                bounds = (rule.at_least, rule.at_most, rule.above)
                assert any(bound is not None for bound in bounds), f"[{section}] {key} has no bound"


@pytest.mark.parametrize(
    ("section", "changed", "told"),
    [
        ("Split", {"test_share": "0.9"}, r"\[Split\] test_share \+ val_share"),
        (
            "Train",
            {"keep_policy": "best", "watch_every": "0"},
            r"\[Train\] keep_policy = best needs",
        ),
        ("Train", {"quantize": "nf4"}, r"\[Train\] quantize = nf4 needs adapters to train"),
        ("Train", {"lora_rank": "4", "freeze": "vision"}, r"\[Train\] freeze is for training all"),
        ("Train", {"rewards": "{}"}, r"\[Train\] rewards is empty"),
        (
            "Train",
            {
                "trl": '{"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}'
            },
            r"scale_rewards = none does not go with multi_objective_aggregation",
        ),
        (
            "Train",
            {"think_limit": "32"},
            r"\[Train\] think_limit must be above think_target; got 32",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused_as_early(
    config, section, changed, told
):  # fmt: skip
    for key, value in changed.items():
        config.set(section, key, value)
    with pytest.raises(SettingsError, match=told):
        check_configuration()


def test_on_the_command_line_they_are_refused_before_a_fingerprint():
    made = Register.get_task_cls("Train")(dataset="beetles", watch_every=0, keep_policy="best")
    with pytest.raises(SettingsError, match=r"\[Train\] keep_policy = best needs watch_every"):
        assert made.fingerprint


def test_settings_of_one_dataset_are_checked_with_the_others(config):
    config.add_section("BuildMCQ:cub")
    config.set("BuildMCQ:cub", "min_options", "6")
    with pytest.raises(SettingsError, match="min_options must be at most num_options; got 6 and 4"):
        check_configuration()


@pytest.mark.process
@pytest.mark.parametrize("by", ["file", "command line"])
def test_luigi_ends_before_a_stage_has_run(tmp_path, by):
    text = (ROOT / "luigi.cfg").read_text()
    wrong = text.replace("vocabulary = closed", "vocabulary = ajar") if by == "file" else text
    (tmp_path / "luigi.cfg").write_text(wrong)
    line = ["-m", "luigi", "--module", "pipeline.tasks", "TrainDiVE"]
    line += [] if by == "file" else ["--BuildMCQ-vocabulary", "ajar"]
    done = subprocess.run(
        [sys.executable, *line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "vocabulary must be closed or open; got 'ajar'" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["luigi.cfg"]
