"""Recipes name settings that exist, and launch configurations that accelerate reads."""

import configparser
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
            assert key in known[section.split(":")[0]], f"[{section}] {key}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_trl_takes_a_recipes_options_and_its_checkpoints_fall_on_boundaries(
    recipe, tmp_path, monkeypatch
):
    import torch

    from training import config as config_module

    read = configparser.RawConfigParser()
    read.read([ROOT / "luigi.cfg", recipe])
    train = read["Train"]
    processes = {"eight_gpus_fsdp2": 8, "zero3": 8, "many_nodes": 16}.get(recipe.stem, 1)
    monkeypatch.setattr(config_module, "_world_size", lambda: processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {key: json.loads(train[key]) for key in ("trl", "rewards", "dynamic_sampling")}
    given["trl"] |= {"use_cpu": True}
    keys = ("steps", "questions_per_step", "num_generations", "max_completion_length", "save_steps")
    given |= {key: int(train[key]) for key in (*keys, "micro_batch_size", "watch_every")}
    given |= {"learning_rate": float(train["learning_rate"]), "dtype": "float32"}
    config = config_module.grpo_config(
        tmp_path, {**given, "seed": 0, "report_to": ""}, given["steps"]
    )
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    assert batch == given["questions_per_step"] * given["num_generations"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_launcher_of_a_recipe_can_be_read(recipe, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    read = configparser.RawConfigParser()
    read.read(recipe)
    launcher = read.get("Train", "launcher", fallback="").split()
    if not launcher:
        return
    monkeypatch.chdir(ROOT)
    config = load_config_from_file(launcher[launcher.index("--config_file") + 1])
    assert config.num_processes >= 8
    assert config.mixed_precision == "bf16"
