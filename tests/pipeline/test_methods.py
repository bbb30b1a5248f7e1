"""The methods that are compared: what each asks, is paid for and shares, from the graph alone."""

import pytest
from luigi.task_register import Register

from pipeline import methods, tasks
from pipeline.settings import SettingsError, run
from pipeline.stage import lineage
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed


def graph(method: str, **changed) -> dict:
    return {"dataset": "beetles", "method": method, "refresh_round": 0, "seed": 0, **changed}


def train(method: str, **changed) -> tasks.Train:
    return tasks.Train(**graph(method, **changed))


def test_every_method_takes_as_many_optimiser_steps_of_as_many_questions():
    rounds = run().rounds
    assert rounds > 1
    for name in methods.METHODS:
        stages = [train(name, refresh_round=r) for r in range(tasks.last_round(name) + 1)]
        given = [stage.arguments() for stage in stages]
        assert (
            sum(a["steps"] for a in given) == rounds * tasks.Train(**graph("dive_k")).settings.steps
        )
        assert len({a["questions_per_step"] for a in given}) == 1
        assert all(a["rounds"] * a["steps"] == 40 for a in given)


def test_rounds_that_start_afresh_are_counted_too():
    second = train("dive_k", refresh_round=1, carry_over=False, trl={"lr_scheduler_type": "linear"})
    assert second.arguments()["rounds"] == run().rounds
    assert second.significant()["rounds"] == 1, "others change nothing of it"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dive_k", {"ask": "mcq", "rewards": {"format": 1.0, "letter": 1.0}}),
        ("virft", {"ask": "open", "rewards": {"format": 1.0, "exact": 1.0}}),
        ("virft_compat", {"ask": "open", "rewards": {"format": 1.0, "virft_compat": 1.0}}),
        ("sft", {"ask": "open"}),
        ("ttrv", {"ask": "open", "rewards": {"format": 1.0, "frequency": 1.0}, "split": []}),
        ("dive_k_majority", {"ask": "mcq", "rewards": {"format": 1.0, "letter": 1.0}}),
        ("contrast", {"ask": "mcq", "pairs": True, "rewards": {"format": 1.0, "contrast": 1.0}}),
        ("visurf", {"ask": "mcq", "truth_rollout": True}),
        ("caption", {"prompt_style": "caption", "rewards": {"caption_format": 1.0, "letter": 1.0}}),
    ],
)
def test_a_method_is_what_departs_from_the_settings(method, expected):
    given = train(method).arguments()
    assert {key: given[key] for key in expected} == expected
    assert train(method).module == f"training.{'sft_baseline' if method == 'sft' else 'grpo'}"


@pytest.mark.parametrize(
    ("method", "name", "own"),
    [("virft", "letter", "exact"), ("direct", "format", "direct_format")],
)
def test_a_reward_that_takes_anothers_place_has_no_weight_beside_it(method, name, own):
    with pytest.raises(SettingsError, match=f"has both {name} and {own}, .* leave {own} out"):
        train(method, rewards={name: 1.0, own: 0.5}).arguments()
    assert own in train(method, rewards={own: 0.5}).settings.rewards


def test_the_length_of_a_thought_counts_only_where_it_is_paid_for():
    same = [train("dive_k", think_target=target, think_limit=40) for target in (5, 6)]
    assert {stage.fingerprint for stage in same} == {train("dive_k").fingerprint}
    rewards = {"format": 1.0, "letter": 1.0, "think_length": 0.5}
    paid = [train("virft", rewards=rewards, think_target=target) for target in (5, 6)]
    assert paid[0].fingerprint != paid[1].fingerprint
    assert paid[0].settings.rewards == {"format": 1.0, "exact": 1.0, "think_length": 0.5}
    assert paid[0].arguments()["think_target"] == 5


@pytest.mark.parametrize("method", ["virft", "sft"])
def test_open_questions_need_no_proposals(method):
    families = {stage.task_family for stage in lineage(train(method))}
    assert "Propose" not in families
    built = tasks.BuildMCQ(subset="", **graph(method))
    assert built.module == "tasks.build_open"
    assert set(built.arguments()) == {
        "card", "download", "split", "prompt", "prompt_style", "shard_size", "seed"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [("random_mcq", "random"), ("text_mcq", "text"), ("hard_negative", "hard_negative")],
)
def test_an_ablation_changes_the_wrong_options_only(method, options):
    stages = {m: tasks.BuildMCQ(subset="", **graph(m)) for m in ("dive_k", method)}
    given = {m: stage.arguments() for m, stage in stages.items()}
    assert given[method].pop("options_from") == options
    assert given["dive_k"].pop("options_from") == "policy"
    assert given[method] == given["dive_k"], "the same proposals, the same rules"


def test_pairs_are_scaled_by_batch_unless_the_user_says_otherwise():
    plain, paired = train("dive_k"), train("contrast")
    assert paired.settings.trl == {**plain.settings.trl, "scale_rewards": "batch"}
    assert paired.significant()["trl"] == paired.settings.trl
    assert "scale_rewards" not in plain.settings.trl
    assert train("contrast", trl={"scale_rewards": "none"}).settings.trl["scale_rewards"] == "none"
    few = {"questions_per_step": 2, "micro_batch_size": 16}
    assert train("contrast", **few).settings.questions_per_step == 2
    assert train("contrast", rewards={"contrast": 1.0}).settings.rewards == {"contrast": 1.0}
    questions = [stage.needs()["mcq/beetles"].arguments() for stage in (plain, paired)]
    assert questions[0] == questions[1], "the pairs are of the same questions"


@pytest.mark.parametrize(
    ("method", "changed", "told"),
    [
        ("contrast", {"trl": {"scale_rewards": "group"}}, "divides away what contrast pays"),
        ("contrast", {"trl": {"scale_rewards": True}}, "divides away what contrast pays"),
        (
            "contrast",
            {"trl": {"multi_objective_aggregation": "normalize_then_sum"}},
            "normalize_then_sum.* divides away what contrast pays",
        ),
        ("contrast", {"dynamic_sampling": 2}, "dynamic_sampling would replace one question"),
        ("contrast", {"questions_per_step": 1}, "questions_per_step must be at least 2"),
        ("contrast", {"rewards": {"format": 1.0}}, "pairs are paid in the place of letter"),
        ("virft", {"order": "curriculum"}, "curriculum goes by candidates, .*asks open questions"),
        (
            "dive_k",
            {"rewards": {"contrast": 1.0}},
            "contrast is for the pairs of the method contrast",
        ),
    ],
)
def test_what_does_not_go_with_a_method_is_refused_before_a_stage_runs(method, changed, told):
    with pytest.raises(SettingsError, match=told):
        train(method, **changed).settings  # noqa: B018


def test_the_majority_vote_takes_the_place_of_the_label_only():
    stages = {m: tasks.BuildMCQ(subset="", **graph(m)) for m in ("dive_k", "dive_k_majority")}
    given = {m: stage.arguments() for m, stage in stages.items()}
    assert given["dive_k"].pop("answer_from") == "label"
    assert given["dive_k_majority"].pop("answer_from") == "majority"
    assert given["dive_k"] == given["dive_k_majority"]
    told = {m: stage.significant()["answer_from"] for m, stage in stages.items()}
    assert told == {"dive_k": "label", "dive_k_majority": "majority"}


@pytest.mark.parametrize(
    ("method", "answer_from"),
    [("dive_k_majority", "label"), ("dive_k", "majority"), ("contrast", "majority")],
)
def test_where_votes_are_the_truth_nothing_goes_by_labels(config, method, answer_from):
    config.set("BuildMCQ", "answer_from", answer_from)
    told = (
        f"best goes by labelled val images; set it to last .the method {method} takes the majority"
    )
    with pytest.raises(SettingsError, match=told):
        train(method, keep_policy="best").settings  # noqa: B018
    assert train("virft", keep_policy="best").settings.keep_policy == "best", "it learns of labels"
    config.set("Propose", "instalments", "4 8")
    told = (
        rf"instalments = 4 8 stops where all answers name the label.* section \[Propose:{method}\]"
    )
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=told):
        train(method).fingerprint  # noqa: B018
    assert train("virft").fingerprint
    config.add_section(f"Propose:{method}")
    config.set(f"Propose:{method}", "instalments", "")
    Register.clear_instance_cache()
    assert train(method).fingerprint
    if answer_from == "label":
        own, others = (tasks.Propose(subset="", **graph(m)) for m in (method, "dive_k"))
        assert (own.settings.instalments, others.settings.instalments) == ("", "4 8")
        assert train("dive_k").fingerprint, "it goes by labels anyway"


def test_a_set_of_a_mix_may_have_votes_for_its_truth(config):
    config.add_section("BuildMCQ:pets")
    config.set("BuildMCQ:pets", "answer_from", "majority")
    assert train("dive_k", keep_policy="best").settings
    with pytest.raises(SettingsError, match="goes by labelled val images"):
        train("dive_k", dataset="beetles+pets", keep_policy="best").settings  # noqa: B018


def test_without_labels_answers_are_read_as_each_sets_candidates_are(config):
    config.set("BuildMCQ", "fuzzy_threshold", "85")
    config.add_section("BuildMCQ:pets")
    config.set("BuildMCQ:pets", "vocabulary", "open")
    config.set("BuildMCQ:pets", "unlabelled_groups", "base novel")
    mixed = train("ttrv", dataset="beetles+pets")
    given = mixed.arguments()
    near = {"fuzzy_threshold": 85.0, "fuzzy_margin": 5.0}
    assert given["reading"] == {
        "beetles": {"vocabulary": "closed", **near},
        "pets": {"vocabulary": "open", **near},
    }
    told = "train images of base classes of beetles; train images of base and novel classes of pets"
    assert given["unlabelled"] == told
    labelled = train("virft").arguments()
    assert ("reading" in labelled, labelled["unlabelled"]) == (False, "")
    before = train("ttrv").fingerprint
    watched = train("ttrv", watch_every=3, watch_images=7)
    assert watched.fingerprint == before, "it watches no images"
    assert train("dive_k", watch_images=7).fingerprint != train("dive_k").fingerprint
    config.set("BuildMCQ", "fuzzy_threshold", "90")
    Register.clear_instance_cache()
    assert train("ttrv").fingerprint != before, "its rewards depend on it"


def test_before_any_training_all_methods_share_their_proposals():
    first = {
        tasks.Propose(subset="", **graph(m)).fingerprint
        for m, kind in methods.METHODS.items()
        if kind.questions == "mcq"
    }
    later = {
        tasks.Propose(subset="", **graph(m, refresh_round=1)).fingerprint
        for m, kind in methods.METHODS.items()
        if kind.refreshes
    }
    assert len(first) == 1
    assert len(later) == sum(kind.refreshes for kind in methods.METHODS.values())


def test_without_a_refresh_the_first_questions_serve_all_steps():
    once, first = train("no_refresh"), train("dive_k")
    assert tasks.last_round("no_refresh") == 0
    assert once.arguments()["steps"] == run().rounds * first.arguments()["steps"]
    questions = [stage.needs()["mcq/beetles"].arguments() for stage in (once, first)]
    assert questions[0] == questions[1]
    families = [
        s.task_family
        for s in lineage(tasks.Report(dataset="beetles", method="no_refresh", seed=0, subset=""))
    ]
    assert families.count("Propose") == 1


def test_a_policy_is_evaluated_in_the_words_it_was_trained_in():
    captioned = tasks.Evaluate(subset="", **graph("caption"))
    assert captioned.arguments()["engine"]["prompt_style"] == "caption"
    plain = tasks.Evaluate(subset="", **graph("zero_shot"))
    assert plain.arguments()["engine"]["prompt_style"] == tasks.engine().settings.prompt_style


def test_an_unknown_method_is_told_what_there_is():
    with pytest.raises(SettingsError, match="unknown method 'magic'; known: dive_k, no_refresh"):
        train("magic").needs()


def test_a_refresh_setting_does_not_touch_the_first_round():
    changed = {"refresh": "unsolved", "solved": "retire"}
    plain, other = (
        [tasks.Propose(subset="", **graph("dive_k", refresh_round=r), **given) for r in (0, 1)]
        for given in ({}, changed)
    )
    assert plain[0].fingerprint == other[0].fingerprint
    assert plain[1].fingerprint != other[1].fingerprint
    needs = other[1].needs()
    assert needs["previous"].refresh_round == needs["train"].refresh_round == 0
    assert needs["train"].fingerprint == other[1].policy().fingerprint
    assert (
        tasks.Propose(subset="", **graph("dive_k", refresh_round=1), solved_at=0.5).fingerprint
        == plain[1].fingerprint
    ), "only what the refresh depends on counts"


def test_how_many_rounds_are_planned_counts_where_the_schedule_depends_on_it():
    constant = {"beta": 0.0, "lr_scheduler_type": "constant"}
    for trl, counts in (
        (constant, False),
        ({**constant, "warmup_steps": 5}, True),
        ({"lr_scheduler_type": "linear"}, True),
        ({}, True),
    ):
        assert ("rounds" in train("dive_k", trl=trl).significant()) == counts
