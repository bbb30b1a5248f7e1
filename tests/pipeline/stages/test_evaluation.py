"""Evaluations in the graph: other sets, modes, published policies, a judge."""

import pytest
from luigi.task_register import Register

from pipeline import tasks
from pipeline.settings import SettingsError
from tasks.runtime.command import bind
from tests.pipeline.test_stage import config  # noqa: F401


def evaluation(**changed) -> tasks.Evaluate:
    given = {"dataset": "beetles", "method": "dive_k", "refresh_round": 1, "seed": 0, "subset": ""}
    return tasks.Evaluate(**given | changed)


def test_an_evaluation_on_another_set_reads_that_sets_images(config):
    there = evaluation(on="pets")
    assert there.set_name == "pets"
    assert there.needs()["split"].folder == tasks.Split(dataset="pets", seed=0).folder
    assert there.needs()["policy"].folder == evaluation().needs()["policy"].folder
    assert there.folder.parts[-6:-1] == ("beetles", "dive_k", "round1", "evaluate", "pets")
    assert there.arguments()["card"] == "pets"
    assert evaluation(on="beetles").folder == evaluation().folder, "its own set"
    mixed = evaluation(dataset="beetles+pets", on="pets")
    assert mixed.folder == evaluation(dataset="beetles+pets", subset="pets").folder
    assert mixed.parts() == []


def test_the_order_of_modes_means_nothing_and_an_unknown_one_is_named(config):
    first = evaluation(modes="two_step one_step").folder
    assert first == evaluation(modes="one_step two_step").folder != evaluation().folder
    with pytest.raises(
        SettingsError, match=r"\[Evaluate\].* modes must name some of one_step, .*'two_steps'"
    ):
        _ = evaluation(modes="two_steps").fingerprint


def test_a_published_policy_is_evaluated_without_training(config, tmp_path):
    stage = evaluation(policy="owner/model@v1", on="pets")
    assert set(stage.needs()) == {"download", "split"}
    assert stage.arguments()["policy"] == "owner/model@v1"
    assert stage.folder.parts[-4:-1] == ("owner--model@v1", "evaluate", "pets")
    assert stage.folder.name != evaluation(policy="owner/model@v2", on="pets").folder.name
    with pytest.raises(SettingsError, match="no such folder, and no hub id"):
        _ = evaluation(policy=str(tmp_path / "none")).folder


@pytest.mark.parametrize("key", ["policy", "on"])
def test_what_one_evaluation_is_given_cannot_stand_in_the_configuration(config, key):
    config.set("Evaluate", key, "some/model")
    with pytest.raises(SettingsError, match=rf"\[Evaluate\] has no key '{key}'"):
        evaluation()


def test_cross_evaluations_are_of_all_other_sets_and_both_policies(config):
    report = tasks.Report(dataset="beetles", method="dive_k", seed=0)
    assert tasks.cross_evaluations(report) == {}
    config.set("Evaluate", "datasets", "pets beetles cub")
    Register.clear_instance_cache()
    found = tasks.cross_evaluations(report)
    assert {name: list(of) for name, of in found.items()} == {
        "pets": ["zero_shot", "dive_k"],
        "cub": ["zero_shot", "dive_k"],
    }
    assert found["cub"]["dive_k"].folder == evaluation(on="cub").folder
    assert found["cub"]["zero_shot"].folder == (
        evaluation(method="zero_shot", refresh_round=0, on="cub").folder
    )
    config.set("Evaluate", "datasets", "pest")
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match="datasets: there is no data card 'pest'"):
        tasks.cross_evaluations(report)


def test_a_judge_is_asked_only_where_one_is_named(config):
    report = tasks.Report(dataset="beetles", method="dive_k", subset="", seed=0)
    assert tasks.judgements(report) == {}
    with pytest.raises(SettingsError, match=r"\[Judge\] url and model must both be set"):
        _ = tasks.Judge(dataset="beetles", method="dive_k", refresh_round=1).fingerprint
    config.set("Judge", "url", "http://127.0.0.1:1/v1")
    config.set("Judge", "model", "m")
    Register.clear_instance_cache()
    found = tasks.judgements(report)
    assert list(found) == ["zero_shot", "dive_k"]
    assert found["dive_k"].arguments()["evaluate"] == str(evaluation().folder)
    assert found["dive_k"].folder.parts[-3:-1] == ("round1", "judge")
    before = found["dive_k"].fingerprint
    for key, value, same in (("url", "http://other/v1", True), ("model", "n", False)):
        config.set("Judge", key, value)
        Register.clear_instance_cache()
        assert (tasks.judgements(report)["dive_k"].fingerprint == before) == same
    seen = {tasks.judgements(report)["dive_k"].fingerprint}
    for answers in ("all", "samples"):
        config.set("Judge", "answers", answers)
        Register.clear_instance_cache()
        seen.add(tasks.judgements(report)["dive_k"].fingerprint)
    assert len(seen) == 3
    config.set("Evaluate", "modes", "one_step")
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=r"\[Judge\] answers = samples needs samples"):
        _ = tasks.judgements(report)["dive_k"].fingerprint


def test_every_stage_function_takes_what_its_task_gives(config):
    from tasks.evaluate import evaluate
    from tasks.judge import judge

    config.set("Judge", "url", "http://127.0.0.1:1/v1")
    config.set("Judge", "model", "m")
    Register.clear_instance_cache()
    stages = [(evaluation(), evaluate), (evaluation(policy="a/b"), evaluate)]
    stages.append((tasks.Judge(dataset="beetles", method="dive_k", refresh_round=1), judge))
    for stage, function in stages:
        bind(function, {"output": "output", **stage.arguments()})
