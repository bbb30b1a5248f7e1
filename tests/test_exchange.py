"""Rollouts from elsewhere come in, questions go out; what comes back is what went out."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tasks import exchange
from tasks.build_mcq import build_mcq
from tasks.language.answers import parse
from tasks.runtime.command import load_arguments
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ROOT


@pytest.fixture
def official(few_beetles, tmp_path):
    """Answers in the official code's form, with the images they are about."""
    names = few_beetles.classes
    answers = {}
    for number in range(6):
        folder = tmp_path / "pictures" / ("cars_train" if number % 2 else "cars_test")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (40 * number, 0, 0)).save(folder / f"{number // 2:05d}.png")
        truth, other = names[number], names[(number + 1) % 6]
        answers[f"{folder.name}/{number // 2:05d}.png"] = {
            "groundtruth": truth,
            "predictions": {truth.upper(): 7, truth: 2, other: 5, names[30]: 3, "a bird": 3},
        }
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers))
    return path, answers


def imported(official, card, tmp_path) -> Path:
    out = tmp_path / "imported"
    exchange.import_rollouts(official[0], card, tmp_path / "pictures", out)
    return out


def test_the_official_json_becomes_rollouts_with_the_same_votes(official, few_beetles, tmp_path):
    out = imported(official, few_beetles, tmp_path)
    config = exchange.configuration(few_beetles, out, ROOT / "luigi.cfg")
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = load_arguments(build_mcq, tmp_path / "config.json")
    arguments["output"].mkdir()
    build_mcq(**arguments)
    rows = {r["image_id"]: r for r in shards.read(out / "build_mcq", "candidates").to_pylist()}
    assert len(rows) == 6, "cars_train/00001 and cars_test/00001 are two images"
    for key, told in official[1].items():
        row = rows[f"few/{key}"]
        truth = few_beetles.classes[row["label"]]
        assert (truth, row["truth_votes"]) == (told["groundtruth"], 9), "spellings are one class"
        assert row["num_rollouts"] == 20
        back = dict(zip(row["answers"], row["answer_votes"], strict=True))
        assert back == told["predictions"], "the round trip keeps every name and count"
    for question in shards.read(out / "build_mcq", "mcq").to_pylist():
        assert few_beetles.classes[30] not in question["options"], "no image is of that class"
        assert (
            question["image"]["bytes"]
            == (tmp_path / "pictures" / question["image_id"][4:]).read_bytes()
        )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a.update({"00001.png": a.popitem()[1]}), "'00001.png' may be .* or .*"),
        (lambda a: a.update({"gone.png": a.popitem()[1]}), "'gone.png' is not there"),
        (lambda a: a.update({"../answers.json": a.popitem()[1]}), "is not there"),
        (lambda a: next(iter(a.values())).update(groundtruth="Crow"), "'Crow', is no class"),
        (lambda a: next(iter(a.values())).update(predictions={"x": -1}), "needs predictions"),
        (lambda a: next(iter(a.values())).update(predictions=[1]), "needs predictions"),
        (lambda a: next(iter(a.values())).update(completions="x"), "needs predictions"),
        (lambda a: [e.pop("predictions") for e in a.values()], "no image has an answer"),
        (lambda a: a.clear(), "at least one image"),
        (lambda a: a.update({"cars_test/00000": a["cars_test/00000.png"]}), "are the same image"),
    ],
)
def test_what_cannot_be_imported_is_named(official, few_beetles, tmp_path, change, told):
    path, answers = official
    change(answers)
    path.write_text(json.dumps(answers))
    with pytest.raises(StageError, match=told):
        imported((path, answers), few_beetles, tmp_path)


def test_completions_come_in_as_they_are_and_labels_may_be_missing(official, few_beetles, tmp_path):
    path, answers = official
    first = next(iter(answers))
    path.write_text(json.dumps({first: {"completions": ["no tags", "<answer>x</answer>"]}}))
    out = imported((path, answers), few_beetles, tmp_path)
    texts = shards.read(out / "propose", "rollouts")["completion"].to_pylist()
    assert texts == ["no tags", "<answer>x</answer>"]
    assert shards.read(out / "split", "split")["label"].to_pylist() == [-1]


def test_an_image_without_answers_is_an_image_with_no_rollouts(
    official, few_beetles, tmp_path, capsys
):
    path, answers = official
    first, *others = list(answers)[:4]
    answers[first]["predictions"] = {}
    answers[others[0]]["predictions"], answers[others[1]] = None, []
    del answers[others[2]]["predictions"]
    path.write_text(json.dumps(answers))
    out = tmp_path / "imported"
    counts = exchange.import_rollouts(path, few_beetles, tmp_path / "pictures", out)
    assert counts == {"images": 6, "rollouts": 40, "images_without_rollouts": 4}
    assert f"4 images have no answers, the first: few/{first}" in capsys.readouterr().out
    config = exchange.configuration(few_beetles, out, ROOT / "luigi.cfg")
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_lost_share": 1.0}))
    arguments = load_arguments(build_mcq, tmp_path / "config.json")
    arguments["output"].mkdir()
    build_mcq(**arguments)
    rows = shards.read(out / "build_mcq", "candidates").to_pylist()
    assert sorted(row["outcome"] for row in rows) == ["kept"] * 2 + ["no_candidates"] * 4
    questions = shards.read(out / "build_mcq", "mcq")["image_id"].to_pylist()
    assert sorted(questions) == [f"few/{key}" for key in list(answers)[4:]]
    assert sorted(row["num_rollouts"] for row in rows) == [0] * 4 + [20] * 2


def test_answers_may_be_lists_and_images_paths_of_any_root_without_suffix(
    official, few_beetles, tmp_path
):
    path, answers = official
    keys = list(answers)
    names = {key: ["x", "y", "x"] for key in keys}
    written = {
        f"./{keys[0]}": {
            "groundtruth": answers[keys[0]]["groundtruth"],
            "predictions": names[keys[0]],
        },
        f"../data/pictures/{keys[1]}": names[keys[1]],
        keys[2].removesuffix(".png"): names[keys[2]],
        f"C:\\data\\{keys[3]}".replace("/", "\\"): {"predictions": {"x": 2, "y": 1}},
        f"/home/me/{keys[4].removesuffix('.png')}": {"predictions": names[keys[4]]},
        (tmp_path / "pictures" / keys[5]).as_posix(): {"predictions": names[keys[5]]},
    }
    path.write_text(json.dumps(written))
    out = imported((path, written), few_beetles, tmp_path)
    rows = shards.read(out / "propose", "rollouts").to_pylist()
    assert {row["image_id"] for row in rows} == {f"few/{key}" for key in keys}
    assert len(rows) == 18
    by_image = [r["completion"] for r in rows if r["image_id"] == f"few/{keys[1]}"]
    assert [parse(text).answer for text in by_image] == ["x", "y", "x"]


def test_help_says_what_each_reader_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exchange", "export", "--help"])
    with pytest.raises(SystemExit, match="0"):
        exchange.main()
    told = capsys.readouterr().out
    for need in (
        "DatasetDict.load_from_disk",
        "data.train_files",
        "custom_reward_function.path=tasks/verl_reward.py",
        "custom_reward_function.name=compute_score",
    ):
        assert need in told


def test_the_command_imports_and_tells_what_to_run_next(
    official, few_beetles, tmp_path, monkeypatch, capsys
):
    (tmp_path / "luigi.cfg").write_text((ROOT / "luigi.cfg").read_text())
    monkeypatch.chdir(tmp_path)
    line = ["exchange", "import", "answers.json", "--card", "few", "--output", "in", "--images"]
    monkeypatch.setattr(sys, "argv", [*line, "pictures"])
    exchange.main()
    told = capsys.readouterr().out
    assert "120 rollouts of 6 images" in told
    assert "python -m tasks.build_mcq in/build_mcq.json" in told
    monkeypatch.setattr(sys, "argv", [*line, "gone"])
    with pytest.raises(SystemExit, match=r"exchange: image 'cars_test/00000\.png' is not there"):
        exchange.main()
