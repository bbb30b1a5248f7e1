"""luigi.cfg: what is missing, misspelt or of the wrong type ends in one sentence."""

import pytest

from pipeline import tasks
from pipeline.settings import SettingsError, check_configuration
from pipeline.stages.engine import engine
from tests.pipeline.test_stage import config  # noqa: F401


def test_a_stage_run_alone_takes_the_graph_parameters_of_the_configuration(config):
    assert tasks.BuildMCQ().refresh_round == 0
    assert tasks.BuildMCQ(refresh_round=1).folder.parts[-4:-1] == ("dive_k", "round1", "build_mcq")


@pytest.mark.parametrize(
    ("section", "key", "told"),
    [
        (
            "BuildMCQ",
            "num_option",
            r"\[BuildMCQ\] has no key 'num_option'; did you mean num_options",
        ),
        ("BuildMQC", "num_options", r"unknown section \[BuildMQC\]; did you mean BuildMCQ"),
        ("train", "steps", r"unknown section \[train\]; did you mean Train"),
        ("run", "rounbs", r"\[run\] has no key 'rounbs'; did you mean rounds"),
    ],
)
def test_a_misspelt_section_or_key_is_an_error_that_names_it(config, section, key, told):
    if not config.has_section(section):
        config.add_section(section)
    config.set(section, key, "3")
    with pytest.raises(SettingsError, match=told):
        check_configuration()


def test_a_missing_setting_names_section_and_key(config):
    config.remove_option("BuildMCQ", "num_options")
    with pytest.raises(SettingsError, match=r"section \[BuildMCQ\] lacks num_options"):
        tasks.BuildMCQ()


def test_a_value_of_the_wrong_type_names_its_section(config):
    config.set("BuildMCQ", "num_options", "five")
    with pytest.raises(
        SettingsError, match=r"\[BuildMCQ\] num_options must be a whole number; got 'five'"
    ):
        tasks.BuildMCQ()


def test_who_holds_the_seed_is_one_of_two_words_and_its_old_key_is_told(config):
    config.set("engine", "seeds", "requests")
    with pytest.raises(
        SettingsError, match=r"\[engine\] seeds must be request or engine; got 'requests'"
    ):
        engine()
    config.set("engine", "seeds", "engine")
    config.set("engine", "server_seeds", "false")
    with pytest.raises(
        SettingsError, match="no key 'server_seeds'; set seeds = request, or engine"
    ):
        engine()


def test_unknown_card_and_method_are_named(config):
    with pytest.raises(SettingsError, match=r"no data card .*beatles.*known cards: .*beetles"):
        _ = tasks.Download(dataset="beatles").fingerprint
    with pytest.raises(SettingsError, match=r"unknown method 'dive'; did you mean dive_k\?"):
        _ = tasks.BuildMCQ(method="dive").fingerprint
