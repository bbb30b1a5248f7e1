"""A mistake in [Train] or [BuildMCQ] is told before a stage runs, with the place where it stands."""

import pytest
from luigi.task_register import Register

import data_cards
from pipeline import methods, tasks
from pipeline.settings import SettingsError
from tasks.runtime.protocol import METHOD_NAMES, ZERO_SHOT
from tests.conftest import ROOT
from tests.pipeline.test_methods import graph, train
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed


@pytest.mark.parametrize(
    ("method", "changed", "told"),
    [
        ("dive_k", {"rewards": {"formatt": 1.0, "letter": 1.0}}, "'formatt' .*did you mean format"),
        ("dive_k", {"rewards": {"no_such:reward": 1.0}}, "No module named 'no_such'"),
        (
            "dive_k",
            {"rewards": {"difficulty_weighted": 1.0}},
            '"group" divides away .* whole group',
        ),
        ("dive_k", {"rewards": {"frequency": 1.0}}, "frequency counts the names of open answers"),
        ("dive_k", {"trl": {"betta": 0.1}}, "TRL has no option 'betta'; did you mean beta"),
        ("dive_k", {"trl": {"max_steps": 7}}, "'max_steps' is set by another key"),
        ("dive_k", {"quantize": "nf4", "lora_rank": 4, "trl": {"use_vllm": True}}, "go with vLLM"),
        (
            "dive_k",
            {"questions_per_step": 4, "num_generations": 2},
            "batch of 8 .* must be a multiple of .* 192 x 1; set it to 8",
        ),
        ("dive_k", {"micro_batch_size": 100, "launcher": "torchrun"}, "100 x 1; set it to 96"),
        ("dive_k", {"trl": {"num_iterations": 3}}, "save_steps = 10 ends between .* multiple of 3"),
        ("dive_k", {"dynamic_sampling": 1, "micro_batch_size": 4}, None),
        ("contrast", {"trl": {"steps_per_generation": 2}}, "into different steps; set it to 1"),
        ("contrast", {"trl": {"generation_batch_size": 384}}, "different steps; set it to 192"),
        ("virft", {"order": "curriculum"}, "curriculum goes by candidates"),
        ("ttrv", {"order": "curriculum"}, "curriculum goes by candidates"),
        ("direct", {"rewards": {"letter": 1.0, "think_length": 0.5}}, "style direct asks for none"),
        ("caption", {"rewards": {"letter": 1.0, "think_length": 0.5}}, None),
        ("ttrv", {"rewards": {"format": 1.0}}, "nothing pays for the name; add letter"),
        ("ttrv", {"rewards": {"tests.paid:by_length": 1.0}}, None),
        ("ttrv", {"rewards": {"frequency": 1.0}}, None),
        ("sft", {"questions_per_step": 5, "order": "curriculum"}, None),
        ("sft", {"rewards": {"difficulty_weighted": 1.0}}, None),
    ],
)
def test_a_mistake_in_train_is_told_before_a_stage_runs(method, changed, told):
    if told is None:
        assert train(method, **changed).settings
        return
    with pytest.raises(SettingsError, match=f"luigi.cfg: .Train. .*{told}"):
        train(method, **changed).fingerprint  # noqa: B018


def test_a_reward_by_taxonomy_needs_one_in_every_card(config, few_beetles):
    rewards = {"letter": 1.0, "graded": 0.5}
    assert data_cards.load("few").taxonomy
    assert train("dive_k", dataset="few", rewards=rewards).settings
    text = (data_cards.FOLDER / "few.md").read_text()
    text = "".join(line for line in text.splitlines(True) if not line.startswith("taxonomy:"))
    (data_cards.FOLDER / "flat.md").write_text(text)
    for dataset in ("flat", "few+flat"):
        with pytest.raises(SettingsError, match="graded needs a taxonomy, and the data card flat"):
            train("dive_k", dataset=dataset, rewards=rewards).settings  # noqa: B018


def test_the_style_of_the_engine_is_that_of_the_prompt_too(config):
    config.set("engine", "prompt_style", "direct")
    with pytest.raises(SettingsError, match="think_length pays for the length of a thought"):
        train("dive_k", rewards={"letter": 1.0, "think_length": 0.5}).settings  # noqa: B018


@pytest.mark.parametrize(
    ("key", "value"), [("unlabelled_part", "test"), ("unlabelled_groups", "novel")]
)
def test_images_without_labels_are_chosen_for_methods_without_labels_alone(config, key, value):
    config.set("BuildMCQ", key, value)
    assert train("ttrv").fingerprint
    for method in ("dive_k", "dive_k_majority", "virft"):
        with pytest.raises(SettingsError, match=f"{key} = {value} does nothing .*{method}, which"):
            train(method).fingerprint  # noqa: B018
    before = train("ttrv").fingerprint
    config.set("BuildMCQ", key, {"test": "train"}.get(value, "base"))
    config.add_section("BuildMCQ:ttrv")
    config.set("BuildMCQ:ttrv", key, value)
    Register.clear_instance_cache()
    assert train("dive_k").fingerprint
    assert train("ttrv").fingerprint == before


def test_no_reward_is_set_for_the_supervised_method_alone(config):
    config.set("Train", "rewards", '{"letter": 1.0}')
    assert train("sft").settings
    config.add_section("Train:sft")
    config.set("Train:sft", "rewards", '{"letter": 1.0}')
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=r"\[Train:sft\] rewards: nothing is rewarded"):
        train("sft").settings  # noqa: B018


@pytest.mark.parametrize(
    ("section", "text", "told"),
    [
        ("Train:ttrv", 'rewards = {"exact": 1.0}', r"own.cfg: \[Train:ttrv\] rewards: exact needs"),
        ("Train:ttrv", "keep_policy = best", r"own.cfg: \[Train:ttrv\] keep_policy = best goes by"),
        ("Train:ttrv", "epochs = 1", r"own.cfg: \[Train:ttrv\] steps and epochs"),
        ("Train", "keep_policy = best", r"own.cfg: \[Train\] keep_policy = best goes by"),
        ("Train:beetles", "order = curriculum", r"own.cfg: \[Train:beetles\] order = curriculum"),
        ("Train:virft", "order = curriculum", None),
        ("BuildMCQ:ttrv", "unlabelled_groups = novel", r"own.cfg: \[BuildMCQ:ttrv\] unlabelled_gr"),
        ("BuildMCQ", "min_options = 9", r"own.cfg: \[BuildMCQ\] min_options must be at most"),
    ],
)
def test_a_message_names_the_file_and_the_section_of_the_value(
    config, monkeypatch, tmp_path, section, text, told
):
    (tmp_path / "own.cfg").write_text(f"[{section}]\n{text}\n")
    monkeypatch.setenv("RECIPE", str(tmp_path / "own.cfg"))
    config.set("Split", "protocol", "all")
    Register.clear_instance_cache()
    if told is None:
        assert train("ttrv").fingerprint
        return
    with pytest.raises(SettingsError, match=told):
        train("ttrv").fingerprint  # noqa: B018


def test_a_message_names_the_command_line_where_it_gives_the_value(config):
    from luigi.cmdline_parser import CmdlineParser

    line = ["TrainDiVE", "--method", "ttrv", "--Train-keep-policy", "best"]
    told = r"command line: \[Train\] keep_policy = best goes"
    with CmdlineParser.global_instance(line), pytest.raises(SettingsError, match=told):
        train("ttrv").settings  # noqa: B018


def test_no_data_card_has_the_name_of_a_method(config):
    assert (*methods.METHODS, ZERO_SHOT) == METHOD_NAMES
    assert not {card.stem for card in (ROOT / "data_cards").glob("*.md")} & set(METHOD_NAMES)
    for dataset in ("contrast", "beetles+contrast"):
        with pytest.raises(SettingsError, match=r"'contrast' is also a method.* rename the data"):
            train("dive_k", dataset=dataset).fingerprint  # noqa: B018
    with pytest.raises(SettingsError, match="'sft' is also a method"):
        tasks.Evaluate(on="sft", subset="", **graph("dive_k")).fingerprint  # noqa: B018


def test_every_parameter_of_the_graph_says_what_it_is():
    for name in Register.task_names():
        for key, parameter in Register.get_task_cls(name).get_params():
            if key in ("dataset", "subset", "method", "seed"):
                assert parameter.description, f"{name} {key}"
