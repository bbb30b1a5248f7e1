"""Recipes and plans: overlays, settings by dataset, and what a run will take, worked out by hand."""

import json
import re
import shutil
import sys

import luigi
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from luigi.task_register import Register

from pipeline import settings, tasks
from pipeline.__main__ import main as command
from pipeline.cli import plan
from pipeline.settings import SettingsError
from pipeline.stage import lineage
from tasks.evaluation import published
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed

RECIPES = ROOT / "training" / "recipes"
PAPER = ("paper_7b.cfg", "paper_3b.cfg")


@pytest.fixture
def recipe(config, monkeypatch, tmp_path):
    """Read a text, or a file of training/recipes, over the default luigi.cfg."""
    monkeypatch.chdir(tmp_path)

    def read(*texts: str) -> None:
        paths = []
        for number, text in enumerate(texts):
            path = RECIPES / text if text.endswith(".cfg") else tmp_path / f"{number}.cfg"
            if not text.endswith(".cfg"):
                path.write_text(text)
            paths.append(str(path))
        monkeypatch.setenv("RECIPE", ",".join(paths))
        Register.clear_instance_cache()

    return read


def train(dataset: str, method: str = "dive_k") -> luigi.Task:
    return tasks.Train(dataset=dataset, method=method, refresh_round=0, seed=0)


def test_recipes_are_read_over_luigi_cfg_in_order(recipe):
    recipe("[Train]\nsteps = 7\nlearning_rate = 0.5\n", "[Train]\nsteps = 8\n")
    made = train("beetles")
    settings = made.settings
    assert (settings.steps, settings.learning_rate, settings.num_generations) == (8, 0.5, 8)


def test_a_section_of_a_dataset_holds_for_it_alone(recipe):
    recipe("[Train:cub]\nsteps = 7\n[Train:beetles+cub]\nsteps = 9\n")
    assert train("beetles").settings.steps == 20
    assert train("cub").settings.steps == 7
    assert train("cub+beetles").settings.steps == 9
    assert train("cub").fingerprint != train("cub").clone(steps=20).fingerprint


def test_a_section_of_a_method_holds_for_it_alone_and_over_that_of_a_dataset(recipe):
    recipe("[Train:virft]\nsteps = 7\n[Train:cub]\nsteps = 9\nlearning_rate = 0.5\n")
    of_virft = train("cub", "virft")
    assert of_virft.settings.steps == 7 * settings.run().rounds  # all its rounds in one
    assert of_virft.settings.learning_rate == 0.5
    assert train("cub").settings.steps == 9
    evaluated = tasks.Evaluate(dataset="cub", subset="", method="virft", refresh_round=1, seed=0)
    assert of_virft.fingerprint in {stage.fingerprint for stage in lineage(evaluated)}


def test_a_recipe_that_is_not_there_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("RECIPE", "no/such.cfg")
    with pytest.raises(SettingsError, match=r"RECIPE: there is no file 'no/such\.cfg'"):
        train("cub")


def test_the_command_line_goes_before_a_section_of_a_dataset(recipe):
    recipe("[Train:cub]\nsteps = 7\n")
    line = [
        "Train",
        "--dataset",
        "cub",
        "--method",
        "dive_k",
        "--refresh-round",
        "0",
        "--seed",
        "0",
    ]
    with luigi.cmdline_parser.CmdlineParser.global_instance([*line, "--Train-steps", "5"]):
        assert train("cub").settings.steps == 5


# Train images, and images that are evaluated: docs/paper.md and the published files' own counts.
PUBLISHED = {
    "cub": (2397, {"base": 600, "novel": 600}),
    "flowers": (1744, {"base": 696, "novel": 1410}),
    "pets": (1508, {"base": 377, "novel": 359}),
    "cars": (3240, {"base": 812, "novel": 823}),
    "aircraft": (1667, {"base": 1666, "novel": 1667}),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_hold_what_is_known_of_it(recipe, name):
    recipe(name)
    for dataset, (images, evaluated) in PUBLISHED.items():
        made = train(dataset)
        assert (made.settings.num_generations, made.settings.questions_per_step) == (4, 6)
        assert made.settings.steps == published.STEPS
        assert made.needs()["policy"].settings.max_pixels == 401408
        assert settings.run().rounds == 1
        found = plan.plan(dataset, "dive_k", 0, plan.Estimates())
        assert found["images"][dataset]["train"] == images
        assert found["images"][dataset]["evaluated"] == evaluated
        assert found["warnings"] == []
        assert found["image_tokens"][dataset] == {
            "training": (512, 512),
            "proposals and evaluation": (16384, 16384),
        }
        note = next(one["notes"][0] for one in found["work"] if one["stage"].startswith("Train"))
        assert f"published: {published.EPOCHS[dataset]} epochs" in note
    mix = "+".join(sorted(PUBLISHED))
    assert (train(mix).settings.steps, train(mix).settings.max_questions) == (400, 2400)
    found = plan.plan(mix, "dive_k", 0, plan.Estimates())["images"]
    assert {n: (of["train"], of["evaluated"]) for n, of in found.items()} == PUBLISHED
    assert "unknown" in (RECIPES / name).read_text().lower()


def test_the_few_shot_recipe_is_read_over_the_others(recipe):
    recipe("paper_7b.cfg", "paper_few_shot.cfg")
    images = {"cub": 800, "flowers": 408, "pets": 148, "cars": 784, "aircraft": 400}
    for dataset, count in images.items():
        found = plan.plan(dataset, "dive_k", 1, plan.Estimates())
        own = found["images"][dataset]
        assert (own["train"], own["evaluated"]) == (count, {"base": count, "novel": 0})
        work = next(one for one in found["work"] if one["stage"].startswith("Train"))
        assert work["steps"] == published.FEW_SHOT_STEPS
        assert "about 200 steps" in work["notes"][0]


def test_epochs_are_counted_in_questions_and_go_without_steps(recipe):
    recipe("[run]\nrounds = 1\n[Train]\nsteps = 0\nepochs = 1.5\n")
    found = plan.plan("beetles", "dive_k", 0, plan.Estimates())
    work = next(one for one in found["work"] if one["stage"].startswith("Train"))
    assert work["steps"] == 60
    assert train("beetles").fingerprint != train("beetles").clone(epochs=2.0).fingerprint
    recipe("", "[run]\nrounds = 2\n")
    with pytest.raises(
        SettingsError, match=r"epochs = 1.5 does not go with carry_over over 2 rounds"
    ):
        plan.plan("beetles", "dive_k", 0, plan.Estimates())


def test_the_average_image_of_a_set_is_counted_once_download_has_run(recipe, tmp_path):
    recipe("[engine]\nmax_pixels = 31360\n")
    folder = tasks.Download(dataset="beetles").folder
    folder.mkdir(parents=True)
    sizes = [(84, 84), (168, 168), (1000, 1000)]
    rows = [{"width": width, "height": height} for width, height in sizes]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images-00000.parquet")
    found = plan.plan("beetles", "dive_k", 0, plan.Estimates())
    assert found["image_tokens"]["beetles"] == {
        "training": (9, 9.0),
        "proposals and evaluation": (40, pytest.approx((9 + 36 + 40) / 3)),
    }
    lengths = found["prompt_tokens"]["beetles"]
    assert lengths["second"] - lengths["question"] == 40 - 9
    work = {one["stage"]: one for one in found["work"]}
    each = round(lengths["propose"] - 40 + 85 / 3)
    assert work["Propose dive_k 0"]["tokens_in"] == 960 * each


def test_a_plan_counts_what_the_settings_say(recipe):
    recipe("[Train]\nsteps = 30\n")
    found = plan.plan(
        "beetles", "dive_k", 0, plan.Estimates(tokens_per_second=100, answer_tokens=10)
    )
    assert found["images"]["beetles"]["train"] == 960
    assert found["images"]["beetles"]["evaluated"] == {"base": 360, "novel": 360}
    work = {one["stage"]: one for one in found["work"]}
    assert work["Propose dive_k 1"]["completions"] == 960 * 20
    assert work["Propose dive_k 1"]["tokens_out"] == 960 * 20 * 10
    assert work["Propose dive_k 1"]["hours"] == pytest.approx(192_000 / 100 / 3600)
    assert work["Train dive_k 0"]["completions"] == 30 * 24 * 8
    assert work["Train dive_k 0"]["notes"][0].startswith("30 steps of 24 questions: 0.75 epochs")
    assert work["Evaluate zero_shot 0"]["completions"] >= 720 * 21
    assert found["hours"] == pytest.approx(sum(one["hours"] for one in found["work"]))
    slower = plan.Estimates(tokens_per_second=100, answer_tokens=10, update_tokens_per_second=1000)
    again = plan.plan("beetles", "dive_k", 0, slower)
    more = work["Train dive_k 0"]["tokens_in"] + work["Train dive_k 0"]["tokens_out"]
    assert again["hours"] - found["hours"] == pytest.approx(2 * more / 1000 / 3600)


def test_assumed_images_are_split_as_the_settings_say(recipe):
    recipe("[Split]\npretrain_share = 0\n[Propose]\nshard_size = 100\n")
    found = plan.plan("beetles", "dive_k", 0, plan.Estimates(images=100_000, image_kb=50))
    counts = found["images"]["beetles"]
    # A fifth is test and a tenth of the rest val; half of the classes are base.
    assert (counts["all"], counts["train"]) == (100_000, 36_000)
    assert counts["evaluated"] == {"base": 10_000, "novel": 10_000}
    assert "that --images assumes" in counts["how"]
    shards = found["shards"]
    assert (shards["Download"], shards["Propose"], shards["BuildMCQ"]) == (100, 2 * 360, 2 * 72)
    assert found["disk"]["gb"]["Download"] == pytest.approx(5)
    assert found["disk"]["gb"]["BuildMCQ"] == pytest.approx(2 * 36_000 * 50e3 / 1e9)


def test_a_card_without_a_size_is_planned_for_assumed_images(recipe, tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "mine.md").write_text(
        "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: photos}\n"
        "classes: [kite, buzzard]\n---\n"
    )
    recipe("")
    with pytest.raises(SettingsError, match="does not say how many images"):
        plan.plan("mine", "dive_k", 0, plan.Estimates())
    assert (
        plan.plan("mine", "dive_k", 0, plan.Estimates(images=1000))["images"]["mine"]["all"] == 1000
    )


@pytest.mark.parametrize(
    ("groups", "part", "images"),
    [("base", "train", 960), ("base novel", "train", 1920), ("novel", "test", 360)],
)
def test_a_plan_counts_the_images_of_training_without_labels(recipe, groups, part, images):
    recipe(
        f"[BuildMCQ]\nunlabelled_groups = {groups}\nunlabelled_part = {part}\n[Split]\nshots = 4\n"
    )
    found = plan.plan("beetles", "ttrv", 0, plan.Estimates())
    (note,) = (one["notes"][0] for one in found["work"] if one["stage"].startswith("Train"))
    few = {960: 96, 1920: 96 + 960}.get(images, images)
    assert f"of {few:,} images" in note, "few shots are drawn of base classes alone"
    assert not any(one["stage"].startswith("Propose") for one in found["work"])


def test_prompts_that_cannot_fit_are_told(recipe):
    recipe("paper_7b.cfg", "[engine]\nmax_model_len = 1500\n")
    found = plan.plan("cub", "dive_k", 0, plan.Estimates())
    assert "exceed [engine] max_model_len = 1,500" in found["warnings"][0]


def test_the_plan_as_a_command(recipe, monkeypatch, capsys, tmp_path):
    (tmp_path / "luigi.cfg").write_text((ROOT / "luigi.cfg").read_text())
    shutil.copytree(RECIPES, tmp_path / "training" / "recipes")  # launchers' files
    recipe("")  # the command sets the variable that this sets back
    line = ["pipeline", "plan", "--recipe", str(RECIPES / "paper_7b.cfg"), "--dataset", "cub"]
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    command()
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    # Four bytes a weight, four a gradient, eight for AdamW's states, two for the reference model, on
    # six GPUs.
    gib = found["memory"]["gib"]
    exact = sum(gib[part] for part in ("weights", "gradients", "optimizer", "reference"))
    assert exact == pytest.approx(8.29e9 * 18 / 6 / 2**30, rel=0.001)
    assert exact < gib["total"]
    assert found["machine"]["gpus"] == 6
    assert all(one["fits"] for one in found["fits"])
    Register.clear_instance_cache()
    monkeypatch.setattr(sys, "argv", [*line, "--tokens-per-second", "5000"])
    command()
    told = capsys.readouterr().out
    assert "hours in all" in told
    assert "read prompts only as far as --tokens-per-second was measured with prompts" in told
    assert "Train fits: " in told
    assert "checkpoints of 99.5" in told
    assert "400 steps of 6 questions: 1.00 epochs of 2,397 images" in told
    Register.clear_instance_cache()
    asked = ["--tokens-per-second", "5000", "--images", "1000000", "--scale", "8", "512"]
    monkeypatch.setattr(sys, "argv", [*line, *asked])
    command()
    told = capsys.readouterr().out
    assert re.search(r"^GPUs +8 +512$", told, re.MULTILINE)
    assert "breaks first on 512: " in told
    monkeypatch.setattr(sys, "argv", [*line, "--scale", "0"])
    with pytest.raises(SystemExit):
        command()
