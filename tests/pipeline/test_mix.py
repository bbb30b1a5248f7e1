"""A mix of sets in the graph: one policy, each set's own images, questions and evaluation."""

import pytest
from luigi.cmdline_parser import CmdlineParser
from luigi.task_register import Register

from pipeline import tasks
from pipeline.settings import SettingsError
from pipeline.stage import Stage
from pipeline.stages.data import tell_of_trained_novel_classes
from tests.pipeline.test_stage import config  # noqa: F401


def stages_of_a_mix() -> dict[str, Stage]:
    train = tasks.TrainDiVE(dataset="pets+beetles", method="dive_k", seed=0)
    found = [stage for report in train.requires() for stage in [*tasks.lineage(report), report]]
    return {
        f"{s.task_family}/{getattr(s, 'subset', '') or s.dataset}/{getattr(s, 'refresh_round', '')}": s
        for s in found
    }


def test_a_mix_trains_one_policy_on_the_questions_of_every_set(config):
    found = stages_of_a_mix()
    assert {key for key in found if key.startswith("Train")} == {
        "Train/pets+beetles/0",
        "Train/pets+beetles/1",
    }
    train = found["Train/pets+beetles/0"]
    assert train.arguments()["card"] == "beetles+pets"
    assert train.arguments()["mcq"] == [
        str(found[f"BuildMCQ/{name}/0"].folder) for name in ("beetles", "pets")
    ]
    again = found["Propose/pets/1"]
    assert again.arguments()["card"] == "pets"
    assert again.needs()["policy"].fingerprint == train.fingerprint
    assert (
        found["Evaluate/pets/1"].needs()["policy"].fingerprint
        == found["Train/pets+beetles/1"].fingerprint
    )
    folders = [stage.folder for stage in found.values()]
    assert len({*folders}) == len(folders)


def test_the_sets_of_a_mix_share_their_images_with_runs_of_their_own(config):
    mixed, alone = stages_of_a_mix(), tasks.Split(dataset="pets", seed=0)
    assert mixed["Split/pets/"].folder == alone.folder
    other = tasks.Train(dataset="beetles+pets", method="dive_k", refresh_round=0, seed=0)
    assert other.folder == mixed["Train/pets+beetles/0"].folder, "order means nothing"


def test_a_stage_of_one_set_asked_for_a_mix_stands_for_each_set(config):
    both = tasks.Propose(dataset="beetles+pets", method="dive_k", refresh_round=0, seed=0)
    assert [stage.subset for stage in both.requires()] == ["beetles", "pets"]
    assert [stage.dataset for stage in tasks.Split(dataset="beetles+pets").requires()] == [
        "beetles",
        "pets",
    ]
    assert not both.complete()


def test_a_cap_of_one_set_leaves_the_others_as_they_are(config):
    before = {name: tasks.Split(dataset=name).fingerprint for name in ("beetles", "pets")}
    config.set("Split", "train_caps", '{"pets": 50}')
    Register.clear_instance_cache()
    after = {name: tasks.Split(dataset=name).fingerprint for name in ("beetles", "pets")}
    assert after["beetles"] == before["beetles"]
    assert after["pets"] != before["pets"]
    assert tasks.Split(dataset="pets").arguments()["train_caps"] == {"pets": 50}


@pytest.mark.parametrize(
    ("dataset", "subset", "told"),
    [
        ("beetles+", "", "joined by +"),
        ("beetles+beetles", "", "joined by +"),
        ("beetles+pets", "cub", "subset 'cub' is not in dataset 'beetles.pets'"),
    ],
)
def test_a_mix_that_cannot_be_is_named(config, dataset, subset, told):
    with pytest.raises(SettingsError, match=told):
        _ = tasks.Evaluate(dataset=dataset, subset=subset).fingerprint


def write_cards(folder, **classes):
    """Cards of these classes, in the order in which the first half is base."""
    (folder / "cards").mkdir()
    for name, own in classes.items():
        (folder / "cards" / f"{name}.md").write_text(
            "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: photos}\n"
            f"classes: [{own}]\naliases: {{{own.partition(',')[0]}: [Milvus {name}]}}\n---\n"
        )


def trained_on(dataset: str) -> tasks.Train:
    return tasks.Train(dataset=dataset, method="dive_k", refresh_round=0, seed=0)


def test_a_class_that_one_set_trains_and_another_holds_out_is_told_once(
    config, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    write_cards(tmp_path, one="Kite, Crow, Jay, Owl", two="Jay, Wren, MILVUS one, the kite")
    tell_of_trained_novel_classes.cache_clear()
    trained_on("two+one").requires()
    trained_on("one+two").requires()
    assert [record.getMessage() for record in caplog.records] == [
        "mix one+two: training sees 2 of the novel classes of two, as base classes of one (MILVUS one, the kite), "
        "so the novel accuracy of two is not of new classes alone",
        "mix one+two: training sees 1 of the novel classes of one, as base classes of two (Jay), "
        "so the novel accuracy of one is not of new classes alone",
    ]


@pytest.mark.parametrize(
    ("dataset", "protocol"), [("one+three", "base_to_novel"), ("two+one", "all"), ("one", "all")]
)
def test_a_mix_whose_novel_classes_are_new_is_not_warned_of(
    config, tmp_path, monkeypatch, caplog, dataset, protocol
):
    monkeypatch.chdir(tmp_path)
    write_cards(tmp_path, one="Kite, Owl", two="Owl, Kite", three="Kite, Jay")
    config.set("Split", "protocol", protocol)
    tell_of_trained_novel_classes.cache_clear()
    trained_on(dataset).requires()
    assert not caplog.records


def test_a_cap_for_a_card_that_is_not_there_is_named(config):
    config.set("Split", "train_caps", '{"beatles": 50}')
    with pytest.raises(SettingsError, match="train_caps: there is no data card 'beatles'"):
        _ = tasks.Split(dataset="beetles").fingerprint


OWN = "[Split:pets]\nval_per_class = 3\n[Evaluate:pets]\npart = val\n[Evaluate:beetles+pets]\nlimit = 9\n"


def _parts_and_limits(stages: list[Stage]) -> list[tuple[str, int]]:
    return [(stage.settings.part, stage.settings.limit) for stage in stages]


def test_a_set_of_a_mix_has_the_settings_of_its_own_section(config, monkeypatch, tmp_path):
    (tmp_path / "own.cfg").write_text(OWN)
    monkeypatch.setenv("RECIPE", str(tmp_path / "own.cfg"))
    Register.clear_instance_cache()
    of_mix = {"dataset": "pets+beetles", "method": "dive_k", "refresh_round": 0, "seed": 0}
    parts = tasks.Evaluate(subset="", **of_mix).parts()
    assert _parts_and_limits(parts) == [("test", 9), ("val", 9)]
    found = stages_of_a_mix()
    again = [tasks.Evaluate(subset=name, **of_mix) for name in ("beetles", "pets")]
    assert [s.fingerprint for s in parts] == [s.fingerprint for s in again]
    in_graph = [found[f"Evaluate/{name}/1"] for name in ("beetles", "pets")]
    assert _parts_and_limits(in_graph) == [("test", 9), ("val", 9)]
    elsewhere = tasks.Evaluate(**(of_mix | {"dataset": "beetles"}), on="pets")
    assert elsewhere.settings.part == "val"
    splits = tasks.Split(dataset="pets+beetles", seed=0).parts()
    assert [s.folder for s in splits] == [found[f"Split/{n}/"].folder for n in ("beetles", "pets")]
    assert [s.settings.val_per_class for s in splits] == [0, 3]


@pytest.mark.parametrize("option", [["--part", "test"], ["--Evaluate-part", "test"]])
def test_the_command_line_goes_before_the_section_of_a_set_of_a_mix(
    config, monkeypatch, tmp_path, option
):
    (tmp_path / "own.cfg").write_text(OWN)
    monkeypatch.setenv("RECIPE", str(tmp_path / "own.cfg"))
    Register.clear_instance_cache()
    line = ["Evaluate", "--dataset", "beetles+pets", *option]
    with CmdlineParser.global_instance(line) as parser:
        assert _parts_and_limits(parser.get_task_obj().parts()) == [("test", 9), ("test", 9)]


def test_an_option_of_the_stage_that_is_run_leaves_earlier_rounds_their_section(
    config, monkeypatch, tmp_path
):
    (tmp_path / "own.cfg").write_text("[Train:beetles]\nsteps = 9\n")
    monkeypatch.setenv("RECIPE", str(tmp_path / "own.cfg"))
    Register.clear_instance_cache()
    line = ["Train", "--dataset", "beetles", "--refresh-round", "1", "--steps", "7"]
    with CmdlineParser.global_instance(line) as parser:
        last = parser.get_task_obj()
        assert (last.settings.steps, last.policy().settings.steps) == (7, 9)


def test_a_section_of_a_mix_is_refused_where_a_stage_works_on_one_set(
    config, monkeypatch, tmp_path
):
    (tmp_path / "own.cfg").write_text("[Split:beetles+pets]\nshots = 4\n")
    monkeypatch.setenv("RECIPE", str(tmp_path / "own.cfg"))
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=r"write \[Split:beetles\] and \[Split:pets\]"):
        tasks.Split(dataset="pets", seed=0)
