"""[engine]: its defaults are those of luigi.cfg, which still has to name every key; what is refused."""

from dataclasses import MISSING, fields

import pytest
from luigi.task_register import Register

from pipeline.settings import SettingsError
from pipeline.stages.engine import engine
from tasks.engines.settings import EngineSettings
from tasks.propose import propose
from tasks.runtime.command import bind
from tasks.runtime.errors import StageError
from tasks.runtime.settings import rules
from tests.conftest import ENGINE, propose_arguments, settings_of
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture

OPERATIONAL = [name for name, (_, rule) in rules(EngineSettings).items() if not rule.significant]


def test_what_cannot_change_a_result_or_may_be_unset_has_the_default_of_luigi_cfg():
    """Nothing else has a default, so that no recipe leaves open what decides on its results."""
    defaults = {f.name: f.default for f in fields(EngineSettings) if f.default is not MISSING}
    unset = {
        n: rule.unset for n, (_, rule) in rules(EngineSettings).items() if rule.unset is not None
    }
    assert set(defaults) == {*OPERATIONAL, *unset}
    written = settings_of(EngineSettings).values()
    assert defaults == {name: written[name] for name in defaults}
    assert unset == {name: written[name] for name in unset}


@pytest.mark.parametrize("name", ["backend", "ray_address", "temperature"])
def test_a_key_that_luigi_cfg_lacks_is_an_error_with_a_default_or_without(config, name):
    config.remove_option("engine", name)
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=rf"section \[engine\] lacks {name}"):
        engine()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"backend": "vlm"}, r"backend must be vllm, server, ray, .* module:function; got 'vlm'"),
        ({"dtype": "float8"}, "dtype must be auto, float32, bfloat16 or float16; got 'float8'"),
        ({"list_position": "behind"}, "list_position must be in_question or before_image"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1; got 0"),
        ({"server_url": "http://me:hunter2@host/v1"}, "server_url holds a password"),
    ],
)
def test_a_wrong_value_is_refused_by_its_section_and_key(changed, told):
    with pytest.raises(StageError, match=rf"\[engine\] {told}") as caught:
        settings_of(EngineSettings, **changed)
    assert "hunter2" not in str(caught.value)


def test_a_recipe_by_hand_is_told_which_key_of_its_engine_is_wrong(split_set):
    given = {"output": split_set.root, "engine": ENGINE.values() | {"temprature": 1.0}}
    with pytest.raises(KeyError, match="unknown key 'temprature'; known: prompt_style"):
        bind(propose, propose_arguments(split_set, **given))
    del given["engine"]["temprature"], given["engine"]["temperature"]
    with pytest.raises(KeyError, match="key 'temperature' is missing"):
        bind(propose, propose_arguments(split_set, **given))
