"""Two sets in one run: one policy learns from the questions of both, each is evaluated apart.

The trainer is real; the answers of Propose and Evaluate come from an engine without a model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.artifacts import store
from tasks.tables import shards
from tests.conftest import write_few_card
from tests.test_line import ROOT, command, settings

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A folder in which TrainDiVE ran on two cards; the second has other words and images."""
    folder = tmp_path_factory.mktemp("mixed")
    cards = write_few_card(folder / "cards", "{pretrain: 2, train: 2, val: 1, test: 1}")
    text = (cards / "few.md").read_text().replace("noun: beetle", "noun: bug")
    (cards / "bugs.md").write_text(text.replace("  seed: 0", "  seed: 1"))
    config = settings().replace("backend = vllm", "backend = tests.fakes:engine")
    config = config.replace("steps = 60", "steps = 2").replace("steps = 4\n", "steps = 2\n")
    config = config.replace("train_caps = {}", 'train_caps = {"bugs": 30}')
    (folder / "luigi.cfg").write_text(config)
    done = run(folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (folder / "log").write_text(done.stdout)
    return folder


def run(folder: Path) -> subprocess.CompletedProcess:
    arguments = command("TrainDiVE", "--dataset", "few+bugs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


def current(folder: Path, stage: str) -> Path:
    return folder / "artifacts" / "bugs+few" / stage / "current"


def test_the_policy_learned_from_the_questions_of_both_sets(mixed):
    for round_ in (0, 1):
        ids = {
            name: set(
                shards.read(current(mixed, f"dive_k/round{round_}/build_mcq/{name}"), "mcq")[
                    "mcq_id"
                ].to_pylist()
            )
            for name in ("few", "bugs")
        }
        assert not ids["few"] & ids["bugs"], "the same class names, but other images and questions"
        train = current(mixed, f"dive_k/round{round_}/train")
        asked = set(shards.read(train, "completions")["mcq_id"].to_pylist())
        assert asked & ids["few"]
        assert asked & ids["bugs"]
        assert asked <= ids["few"] | ids["bugs"]


def test_each_set_is_asked_about_in_the_words_of_its_own_card(mixed):
    for name, noun in (("few", "beetle"), ("bugs", "bug")):
        table = shards.read(current(mixed, f"dive_k/round0/build_mcq/{name}"), "mcq")
        questions = table["question"].to_pylist()
        assert all(f" {noun}" in text for text in questions)
        assert all(i.startswith(f"{name}/") for i in table["image_id"].to_pylist())


def test_a_cap_holds_for_its_set_alone(mixed):
    images = {}
    for name in ("few", "bugs"):
        rollouts = shards.read(current(mixed, f"round0/propose/{name}"), "rollouts")
        images[name] = len(set(rollouts["image_id"].to_pylist()))
    assert images == {"few": 40, "bugs": 30}


def test_each_set_has_an_evaluation_and_a_report_of_its_own(mixed):
    for name in ("few", "bugs"):
        report = current(mixed, f"dive_k/report/{name}")
        metrics = json.loads((report / "metrics.json").read_text())
        assert metrics["card"]["name"] == name
        predictions = shards.read(current(mixed, f"dive_k/round1/evaluate/{name}"), "predictions")
        assert {i.split("/")[0] for i in predictions["image_id"].to_pylist()} == {name}
        assert f"\n{name}: 20 base and 20 novel test images" in (mixed / "log").read_text()


def test_unchanged_it_runs_nothing_and_a_single_stage_can_be_named(mixed):
    again = run(mixed)
    assert again.returncode == 0
    assert "Did not run any tasks" in again.stdout + again.stderr
    chosen = command("BuildMCQ", "--dataset", "few+bugs", "--BuildMCQ-num-options", "3")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(chosen, cwd=mixed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("few", "bugs"):
        made = current(mixed, f"dive_k/round0/build_mcq/{name}")
        assert store.read_manifest(made)["settings"]["num_options"] == 3


def test_where_and_inspect_find_every_set(mixed):
    def said(*arguments: str) -> str:
        line = [sys.executable, "-m", "pipeline", *arguments, "--dataset", "few+bugs"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, cwd=mixed, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = said("results")
    assert where.count("accuracy in %") == 2, "the figures of each set"
    assert "report/few/current/index.html" in where
    assert "report/bugs/current/index.html" in where
    assert "dive_k/round1/train/current" in where
    found = said("inspect", "build_mcq", "--rows", "0")
    assert "build_mcq/few/" in found
    assert "build_mcq/bugs/" in found


def test_methods_are_compared_on_each_set_of_the_mix(mixed):
    given = ("--seeds", "[0]", "--methods", '["dive_k"]')
    chosen = command("Compare", "--dataset", "few+bugs", *given)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(chosen, cwd=mixed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((current(mixed, "compare") / "compare.json").read_text())
    assert [(t["set"], t["trained_on"]) for t in found["sets"]] == [
        ("bugs", "bugs+few"),
        ("few", "bugs+few"),
    ]
    assert [row["name"] for row in found["rows"]] == ["zero_shot", "dive_k, round 0", "dive_k"]
    spent = found["budgets"]["bugs+few"]
    assert spent["dive_k"]["optimiser_steps"] == 2 * spent["dive_k, round 0"]["optimiser_steps"]
    for table in found["sets"]:
        report = json.loads(
            (current(mixed, f"dive_k/report/{table['set']}") / "metrics.json").read_text()
        )
        for index, name in ((0, "zero_shot"), (1, "dive_k")):
            told = report["evaluations"][index]["modes"]["one_step"]["harmonic_mean"]["accuracy"]
            assert table["modes"]["one_step"][name]["harmonic_mean"]["by_seed"] == [told]
    assert "Over datasets" in (current(mixed, "compare") / "compare.md").read_text()
