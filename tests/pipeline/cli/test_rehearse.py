"""A rehearsal says what is ready, what is to mend and what it cannot know, and a trial runs all stages."""

import json
import os
import subprocess
import sys

import pytest

from pipeline import settings, tasks
from pipeline.cli import rehearse
from pipeline.cli.trial import overlay
from tests.conftest import ROOT, write_few_card
from tests.pipeline.cli.test_plan import recipe  # noqa: F401  a fixture
from tests.pipeline.test_stage import config  # noqa: F401  a fixture


def points(dataset: str = "beetles") -> dict[str, rehearse.Point]:
    found = list(rehearse.rehearse(dataset, "dive_k", 0, step=False))
    return {point.what: point for point in found}


def test_the_default_run_is_ready_without_a_step(recipe):
    recipe()
    found = points()
    assert {point.state for point in found.values()} <= {rehearse.READY, rehearse.OPEN}
    assert {"graph", "packages", "gpu", "lengths", "launcher"} <= found.keys()


def test_a_prompt_that_is_too_long_is_a_point_to_mend(recipe):
    recipe("[engine]\nmax_model_len = 20\n")
    assert points()["lengths"].state == rehearse.MEND
    assert "max_model_len" in points()["lengths"].sentence


def test_a_setting_that_cannot_be_used_is_the_last_point(recipe):
    recipe("[Evaluate]\nmodes = one_stepp\n")
    assert list(points())[-1] == "settings"
    assert "one_stepp" in points()["settings"].sentence


def test_a_package_of_another_version_is_named(recipe, monkeypatch):
    recipe()
    monkeypatch.setattr(
        rehearse.metadata,
        "requires",
        lambda _: ["trl==0.1", "luigi>=3", "nobody-has-this", "x; extra == 'y'"],
    )
    told = points()["packages"].sentence
    assert "trl" in told
    assert "nobody-has-this is missing" in told
    assert "luigi" not in told
    assert "make setup" in told


def test_the_cpu_build_beside_a_gpu_is_to_mend(recipe, monkeypatch):
    recipe()
    monkeypatch.setattr(rehearse, "gpus", lambda: ["0"])
    monkeypatch.setattr(rehearse.vllm, "on_gpu", lambda: False)
    assert points()["gpu"].state == rehearse.MEND


@pytest.mark.parametrize(
    ("line", "processes"),
    [
        ("", 1),
        ("torchrun --nproc_per_node 2", 2),
        ("torchrun --nproc-per-node=4", 4),
        ("accelerate launch --num_processes 3", 3),
        (f"accelerate launch --config_file {ROOT}/training/recipes/fsdp2.yaml", 8),
        ("acelerate launch", 0),
        ("accelerate launch --config_file nowhere.yaml", 0),
    ],
)
def test_a_launcher_is_found_and_its_processes_are_counted(line, processes):
    found, point = rehearse.launcher(line)
    assert found == processes
    assert point.state == (rehearse.READY if processes else rehearse.MEND), point.sentence


def test_a_trials_settings_go_before_a_recipes_own_for_a_dataset(recipe):
    recipe("paper_7b.cfg", overlay("cub", 2, True))
    train = tasks.Train(dataset="cub", method="dive_k", refresh_round=0, seed=0)
    own = train.settings
    assert (own.steps, own.save_steps, own.watch_every) == (4, 2, 4)
    assert tasks.Split(dataset="cub").significant()["max_train_images"] == 100
    assert tasks.Evaluate(dataset="cub", refresh_round=0).limit == 5
    assert settings.known_keys()  # and no key of it is unknown


def test_a_trials_settings_go_before_those_of_a_set_of_a_mix(recipe):
    recipe("[Evaluate:pets]\nlimit = 100\n", overlay("pets+beetles", 1, False))
    mix = {"dataset": "beetles+pets", "refresh_round": 0}
    assert [stage.limit for stage in tasks.Evaluate(**mix).parts()] == [5, 5]
    assert [stage.max_lost_share for stage in tasks.Propose(**mix).parts()] == [1, 1]
    assert tasks.Train(**mix).settings.steps == 2


def test_a_limit_of_no_images_is_no_other_evaluation(recipe):
    recipe()
    whole = tasks.Evaluate(dataset="beetles", refresh_round=0)
    assert "limit" not in whole.significant()
    assert whole.clone(limit=5).fingerprint != whole.fingerprint


@pytest.mark.model
def test_a_rehearsal_with_a_trial_of_a_policys_folder(tmp_path):
    from training.model import tiny_policy

    write_few_card(tmp_path / "cards")
    policy, processor = tiny_policy.build(["beetle"], seed=0)
    tiny_policy.save(policy, processor, tmp_path / "policy")
    (tmp_path / "luigi.cfg").write_text((ROOT / "luigi.cfg").read_text())
    (tmp_path / "real.cfg").write_text(
        "[run]\ndataset = few\n[engine]\nbackend = tests.fakes:engine\n"
        "[BasePolicy]\nmodel = policy\nsteps = 0\n"
        "[Train]\nquestions_per_step = 2\nnum_generations = 4\nmicro_batch_size = 8\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline",
            "rehearse",
            "--recipe",
            "real.cfg",
            "--trial",
            "yes",
            "--json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {point["what"]: point for point in json.loads(done.stdout)}
    states = {what: point["state"] for what, point in found.items()}
    for what in ("trainer", "shape", "engine", "step"):
        assert states[what] == "ready", found[what]
    for stage in ("Propose", "BuildMCQ", "Train", "Evaluate"):
        assert states[f"trial: {stage}"] == "ready", found
    assert "stopped and resumed" in found["trial: Train"]["sentence"]
    assert "tokens a second" in found["trial: Train"]["sentence"]
    artifacts = tmp_path / "artifacts"
    names = {path.parent.parent.name for path in artifacts.rglob("manifest.json")}
    assert names == {"download", "base_policy"}, "the trial's artifacts are deleted"
    assert all(link.exists() for link in artifacts.rglob("curren[t]")), "and no link leads to them"
    assert not list(artifacts.rglob(".rehearsal-*"))
