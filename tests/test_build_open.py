"""Open questions without labels: which images they are about, and that no label stands in them."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from luigi.task_register import Register

from pipeline import tasks
from pipeline.__main__ import main as command
from pipeline.cli import verify
from pipeline.settings import SettingsError
from tasks.build_open import build_open
from tasks.questions.exchange_formats import export_questions
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tests.conftest import ROOT, run_stage
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed
from training.data.dataset import Questions

TELLS = {"options", "answer_letter", "label", "truth_share"}


def built(made, groups: str, part: str = "train", **changed) -> Path:
    output = made.root / f"open-{groups}-{part}".replace(" ", "-")
    output.mkdir()
    given = {"card": "few", "download": made.download, "split": made.split, "prompt": "open"}
    given |= {"prompt_style": "brief", "shard_size": 7, "seed": 0}
    own = {"unlabelled_groups": groups, "unlabelled_part": part} if groups else {}
    run_stage(build_open, output, **{**given, **own, **changed})
    return output


@pytest.mark.parametrize(
    ("groups", "part", "wanted"),
    [
        ("base", "train", {("base", "train")}),
        ("novel", "train", {("novel", "unused")}),
        ("base novel", "train", {("base", "train"), ("novel", "unused")}),
        ("novel", "test", {("novel", "test")}),
        ("base novel", "test", {("base", "test"), ("novel", "test")}),
    ],
)
def test_it_asks_about_the_images_that_are_set_and_no_others(split_set, groups, part, wanted):
    folder = built(split_set, groups, part)
    rows = shards.read(folder, "mcq").to_pylist()
    split = shards.read(split_set.split, "split").to_pylist()
    asked = sorted(row["image_id"] for row in rows)
    assert asked == sorted(
        row["image_id"] for row in split if (row["group"], row["split"]) in wanted
    )
    if part == "train":
        tested = {row["image_id"] for row in split if row["split"] in ("test", "val")}
        assert not tested.intersection(asked), "never the images that are then scored"
    assert len({row["mcq_id"] for row in rows}) == len(rows)
    counts = Counter(row["group"] for row in split if (row["group"], row["split"]) in wanted)
    assert json.loads((folder / "stats.json").read_text())["unlabelled"] == counts


def test_with_labels_an_image_that_has_none_gives_no_question(split_set):
    path = split_set.split / "split.parquet"
    rows = shards.read_file(path).to_pylist()
    trained = [row for row in rows if (row["group"], row["split"]) == ("base", "train")]
    trained[0]["label"] = -1
    trained[1]["label"] = None
    shards.write(path, rows, schemas.split(split_set.card.classes))
    asked = shards.read(built(split_set, ""), "mcq")["image_id"].to_pylist()
    assert asked == sorted(row["image_id"] for row in trained[2:])
    for row in trained:
        row["label"] = -1
    shards.write(path, rows, schemas.split(split_set.card.classes))
    shutil.rmtree(split_set.root / "open--train")
    with pytest.raises(StageError, match="no train image has a label to learn from"):
        built(split_set, "")


def test_no_label_stands_in_a_question_or_reaches_the_trainer(split_set):
    folder = built(split_set, "base")
    for row in shards.read(folder, "mcq").to_pylist():
        assert row["options"] == row["option_class_ids"] == row["option_sources"] == []
        assert row["answer_letter"] == ""
        told = [row[name] for name in ("truth_injected", "label_differs", "truth_share")]
        assert not any(told)
    questions = Questions([folder], [split_set.card], None, seed=0, cache=split_set.root / "cache")
    row = questions.rows(4)[0]
    assert set(row) == {"prompt", "image", "card", "mcq_id", "image_id"}
    assert not TELLS.intersection(row)
    assert set(questions.further(2, 0)[0]) == set(row)
    labelled = Questions(
        [built(split_set, "")], [split_set.card], None, seed=0, cache=split_set.root / "other"
    )
    assert set(labelled.rows(4)[0]) >= TELLS


def test_other_labels_make_the_same_questions(split_set):
    """With each class taken for another, and the split in another order, what is written is the same."""
    before = shards.read(built(split_set, "base novel"), "mcq")
    path = split_set.split / "split.parquet"
    rows = shards.read_file(path).to_pylist()
    for row in rows:
        row["label"] = (row["label"] + 5) % len(split_set.card.classes)
    shards.write(path, rows[::-1], schemas.split(split_set.card.classes))
    shutil.rmtree(split_set.root / "open-base-novel-train")
    assert shards.read(built(split_set, "base novel"), "mcq").equals(before)


def test_a_closed_list_has_the_classes_of_the_groups(split_set):
    folder = built(split_set, "novel", prompt="closed_list")
    (text,) = set(shards.read(folder, "mcq")["question"].to_pylist())
    novel = split_set.card.classes[len(split_set.card.classes) // 2 :]
    assert all(name in text for name in novel)
    places = [text.index(name) for name in novel]
    assert places == sorted(places), "by class id"
    assert not any(name in text for name in split_set.card.classes[: len(novel)])
    with pytest.raises(StageError, match="prompt must be open or closed_list; got 'list'"):
        built(split_set, "base", prompt="list")


def test_novel_images_that_are_not_there_are_missed_in_a_sentence(split_set):
    path = split_set.split / "split.parquet"
    rows = [row for row in shards.read_file(path).to_pylist() if row["split"] != "unused"]
    shards.write(path, rows, schemas.split(split_set.card.classes))
    with pytest.raises(
        StageError, match=r"holds no train images of novel classes; its source"
    ) as told:
        built(split_set, "base novel")
    assert "unlabelled_part = test" in str(told.value)
    rows = [{**row, "group": "base"} for row in rows]
    shards.write(path, rows, schemas.split(split_set.card.classes))
    with pytest.raises(StageError, match=r"protocol = all every class is base: leave novel out"):
        built(split_set, "novel")


def test_other_trainers_cannot_use_questions_without_an_answer(split_set, tmp_path):
    folder = built(split_set, "base")
    for style in ("easyr1", "verl"):
        with pytest.raises(
            StageError, match="has no answer, since it is for training without labels"
        ):
            export_questions(folder, style, tmp_path / style)


def test_inspect_shows_open_questions(split_set, monkeypatch, capsys):
    folder = built(split_set, "base")
    manifest = {"stage": "BuildMCQ", "fingerprint": "0123", "rows": {"mcq": 60}, "seconds": 1}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "stats": {"questions": 60}}))
    shutil.copy(ROOT / "luigi.cfg", split_set.root)
    monkeypatch.chdir(split_set.root)
    monkeypatch.setattr(sys, "argv", ["pipeline", "inspect", str(folder)])
    command()
    told = capsys.readouterr().out
    assert "  questions: 60" in told
    assert "mcq: 60 rows" in told


def test_verify_finds_a_label_where_there_must_be_none(split_set):
    manifest = type("Manifest", (), {"settings": {"unlabelled_groups": "base"}})()
    assert list(verify._letters(built(split_set, "base"), split_set.split, manifest)) == []
    labelled = built(split_set, "")
    (problem,) = verify._letters(labelled, split_set.split, manifest)
    assert "tells a label, in training without labels" in problem
    manifest.settings = {}
    assert list(verify._letters(labelled, split_set.split, manifest)) == []


def graph(**changed) -> dict:
    return {"dataset": "beetles", "method": "ttrv", "refresh_round": 0, "seed": 0, **changed}


def test_the_graph_gives_the_trainer_no_labels(config):
    train = tasks.Train(**graph())
    given = train.arguments()
    assert (given["ask"], given["rewards"]) == ("open", {"format": 1.0, "frequency": 1.0})
    assert (given["split"], given["download"], given["watch_every"]) == ([], [], 0)
    assert given["reading"]["beetles"]["vocabulary"] == "closed"
    assert given["unlabelled"] == "train images of base classes of beetles"
    families = {stage.task_family for stage in tasks.lineage(train)}
    assert families == {"Download", "Split", "BasePolicy", "BuildMCQ"}
    for name, value in (("unlabelled_groups", "novel"), ("unlabelled_part", "test")):
        made = tasks.BuildMCQ(subset="", **graph(), **{name: value})
        assert made.fingerprint != tasks.BuildMCQ(subset="", **graph()).fingerprint
        assert made.arguments()[name] == value
    assert tasks.Train(**graph(), entropy_weight=0.1).fingerprint != train.fingerprint
    config.set("BuildMCQ", "vocabulary", "open")
    assert tasks.Train(**graph(seed=7)).arguments()["reading"]["beetles"]["vocabulary"] == "open"


@pytest.mark.parametrize(
    ("method", "key", "value", "told"),
    [
        ("ttrv", "rewards", '{"format": 1, "exact": 1}', "exact needs labels; leave it out"),
        ("ttrv", "rewards", '{"letter": 1, "graded": 1}', "graded needs labels"),
        ("ttrv", "rewards", '{"letter": 1, "think_length": 1}', "think_length needs labels"),
        ("ttrv", "keep_policy", "best", "keep_policy = best goes by labelled val images"),
        (
            "dive_k",
            "rewards",
            '{"letter": 1, "frequency": 1}',
            "frequency counts the names of open",
        ),
    ],
)
def test_what_needs_labels_is_refused_before_a_stage_runs(config, method, key, value, told):
    config.set("Train", key, value)
    with pytest.raises(SettingsError, match=told):
        tasks.Train(**graph(method=method)).settings  # noqa: B018


def test_novel_classes_without_images_are_refused_before_a_stage_runs(
    config, split_set, monkeypatch
):
    few = graph(dataset="few")
    made = tasks.BuildMCQ(subset="", **few, unlabelled_groups="base novel")
    assert made.requires(), "before Split has run, nobody knows"
    monkeypatch.setitem(vars(made.needed["split"]), "folder", split_set.split)
    assert made.requires(), "they are there"
    rows = [r for r in shards.read(split_set.split, "split").to_pylist() if r["split"] != "unused"]
    path = split_set.split / "split.parquet"
    shards.write(path, rows, schemas.split(split_set.card.classes))
    with pytest.raises(SettingsError, match="holds no train images of novel classes"):
        made.requires()
    tasks.BuildMCQ(subset="", **few).requires()


def test_a_protocol_without_novel_classes_is_refused_before_a_stage_runs(config):
    config.set("Split", "protocol", "all")
    assert tasks.BuildMCQ(subset="", **graph()).needs()
    config.set("BuildMCQ", "unlabelled_groups", "novel")
    Register.clear_instance_cache()
    with pytest.raises(SettingsError, match=r"with \[Split\] protocol = all every class is base"):
        tasks.Train(**graph()).fingerprint  # noqa: B018
    with pytest.raises(SettingsError, match="unlabelled_groups names no group"):
        tasks.BuildMCQ(subset="", **graph(), unlabelled_groups="").settings  # noqa: B018
