"""The values of a recipe.json are checked by their types before the stage's function runs."""

import json
from pathlib import Path

import pytest

from tasks.runtime.command import load_arguments
from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from training.grpo import grpo
from training.settings import TrainSettings

ROUND = {
    "card": "few", "method": "dive_k", "ask": "mcq", "truth_rollout": False, "mcq": ["mcq"],
    "download": ["download"], "split": ["split"], "base": "policy", "policy": "policy",
    "prompt_style": "brief", "refresh_round": 0, "rounds": 1, "seed": 0,
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of Train with some values changed."""

    def write(**changed) -> Path:
        settings = settings_of(TrainSettings).values()
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps({"output": "out", **ROUND, **settings, **changed}))
        return path

    return write


def test_the_recipe_as_the_stage_writes_it_is_taken(recipe):
    arguments = load_arguments(grpo, recipe())
    assert arguments["round"].mcq == [Path("mcq")]
    assert load_arguments(grpo, recipe(learning_rate=1))["settings"].learning_rate == 1.0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate must be a number; got '1e-3'"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number; got inf"),
        ({"questions_per_step": 0}, "questions_per_step must be at least 1; got 0"),
        ({"num_generations": 0}, "num_generations must be at least 2; got 0"),
        ({"num_generations": 4.0}, "num_generations must be a whole number; got 4.0"),
        ({"steps": True}, "steps must be a whole number; got True"),
        ({"carry_over": "false"}, "carry_over must be true or false; got 'false'"),
        ({"trl": [["beta", 0.1]]}, "trl must be an object; got"),
        ({"mcq": "mcq"}, "mcq must be a list, each item a path; got 'mcq'"),
        ({"mcq": [1]}, "mcq must be a list, each item a path; got"),
        ({"seed": "0"}, "seed must be a whole number; got '0'"),
        ({"policy": None}, "policy must be a path; got None"),
        ({"card": 3}, "card must be a text; got 3"),
        ({"output": 3}, "key 'output' must be a path; got 3"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_a_sentence_with_file_and_key(recipe, changed, says):
    path = recipe(**changed)
    with pytest.raises(StageError) as caught:
        load_arguments(grpo, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ['["output"]', '"output"', "{", b"\xff\xfe{}".decode("latin-1")])
def test_a_recipe_that_is_no_object_is_a_sentence(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(StageError, match=r"recipe\.json"):
        load_arguments(grpo, path)


def test_a_recipe_from_before_a_setting_there_was_is_taken_without_it(recipe):
    path = recipe()
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in values.items() if k not in ("epochs", "max_questions")})
    )
    settings = load_arguments(grpo, path)["settings"]
    assert (settings.epochs, settings.max_questions) == (0, 0)
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "learning_rate"}))
    with pytest.raises(StageError, match="key 'learning_rate' is missing"):
        load_arguments(grpo, path)


@pytest.mark.parametrize(
    ("trl", "says"),
    [
        ({"beta": "0.05"}, "beta must be a number; got '0.05'"),
        ({"beta": -1}, "beta must be at least 0; got -1"),
        ({"beta": float("nan")}, "beta must be a finite number; got nan"),
        ({"temperature": 0}, "temperature must be above 0; got 0"),
        ({"temperature": None}, "temperature must be a number; got None"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"min_p": "0"}, "min_p must be a number or null; got '0'"),
        ({"num_iterations": 1.5}, "num_iterations must be a whole number; got 1.5"),
        (
            {"loss_type": "drgrpo"},
            "loss_type must be grpo, dr_grpo, dapo, .* or vespo; got 'drgrpo'",
        ),
        ({"scale_rewards": "groups"}, "scale_rewards must be group, batch or none; got 'groups'"),
        ({"scale_rewards": None}, "scale_rewards must be a text; got None"),
        ({"vllm_mode": "colocated"}, "vllm_mode must be colocate or server"),
    ],
)
def test_options_of_trl_with_bounds_are_checked_with_the_settings(trl, says):
    with pytest.raises(StageError, match=rf"^\[Train\] trl: {says}"):
        settings_of(TrainSettings, trl=trl)


def test_what_trl_takes_is_taken():
    trl = {"beta": 0, "min_p": None, "scale_rewards": False, "loss_type": "dr_grpo", "top_k": 0}
    assert settings_of(TrainSettings, trl=trl).trl == trl
