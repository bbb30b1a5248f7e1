"""Recipes name settings that exist, and launch configurations that accelerate reads."""

import configparser
import json

import pytest

from pipeline.config_files import read_overlay
from pipeline.parameters import parameter, plain
from tasks.runtime.settings import rules
from tests.conftest import ROOT, recipe_files
from training.settings import TrainSettings

RECIPES = sorted((ROOT / "training" / "recipes").glob("*.cfg"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_sets_only_what_there_is(recipe):
    from pipeline import tasks
    from pipeline.settings import known_keys

    assert tasks
    read = configparser.RawConfigParser()
    read.read(recipe)
    known = known_keys()
    for section in read.sections():
        for key in read[section]:
            name = key.partition(".")[0]
            assert name in known[section.split(":")[0]], f"[{section}] {key}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_trl_takes_a_recipes_options_and_its_checkpoints_fall_on_boundaries(
    recipe, tmp_path, monkeypatch
):
    import torch

    from training.loop import trl_settings
    from training.resources.needs import Place

    read = configparser.RawConfigParser()
    read.read(ROOT / "luigi.cfg")
    for path in recipe_files(recipe):
        read_overlay(read, path)
    train = read["Train"]
    processes = Place.of_launcher(train["launcher"], ROOT).processes
    monkeypatch.setattr(trl_settings, "_world_size", lambda: processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {
        name: plain(parameter(kind, rule).parse(train[name]))
        for name, (kind, rule) in rules(TrainSettings).items()
    }
    given["trl"] |= {"use_cpu": True}
    settings = TrainSettings(**{**given, "dtype": "float32"})
    config = trl_settings.grpo_config(tmp_path, settings, total_steps=settings.steps, seed=0)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    assert batch == settings.questions_per_step * settings.num_generations


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_launcher_of_a_recipe_can_be_read(recipe, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    read = configparser.RawConfigParser()
    read.read(recipe_files(recipe))
    launcher = read.get("Train", "launcher", fallback="").split()
    if not launcher:
        return
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(launcher[launcher.index("--config_file") + 1])
    assert config.num_processes >= 8
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("size", ["3b", "7b"])
def test_the_published_runs_go_without_what_trl_has_added_since(size):
    read = configparser.RawConfigParser()
    read.read(ROOT / "training" / "recipes" / f"paper_{size}.cfg")
    trl = json.loads(read["Train"]["trl"])
    assert trl["use_bias_correction_kl"] is trl["vllm_importance_sampling_correction"] is False


def test_the_server_of_several_machines_is_started_as_vllm_and_trl_take_it():
    """By vLLM's own parser, and with all that TRL's own command sets."""
    import shlex

    from trl.scripts.vllm_serve import ScriptArguments, build_command
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    text = (ROOT / "training" / "recipes" / "many_nodes.cfg").read_text()
    start, end = text.index("VLLM_SERVER_DEV_MODE=1"), text.index("#   machine 0:")
    _, vllm, serve, model, *ours = shlex.split(text[start:end].replace("\\\n#", " "))
    assert (vllm, serve) == ("vllm", "serve")
    parser = make_arg_parser(FlexibleArgumentParser())
    given = parser.parse_args(ours)
    assert given.limit_mm_per_prompt == {"image": 1, "video": 0}
    theirs = build_command(ScriptArguments(model=model))
    wanted = parser.parse_args(theirs[theirs.index(model) + 1 :])
    for name in ("enable_scale_out", "weight_transfer_config", "max_logprobs", "logprobs_mode"):
        assert getattr(given, name) == getattr(wanted, name) != parser.get_default(name)
