"""Rollouts from elsewhere come in, questions go out; what comes back is what went out."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tasks import exchange
from tasks.build_mcq import build_mcq
from tasks.runtime.command import load_arguments
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ROOT, mcq_arguments, run_stage


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
        (lambda a: next(iter(a.values())).pop("predictions"), "needs predictions"),
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


@pytest.mark.parametrize("style", exchange.FORMATS)
def test_exported_questions_come_back_whole(rollouts, tmp_path, style):
    from datasets import load_dataset

    mcq, out = tmp_path / "mcq", tmp_path / "out"
    mcq.mkdir()
    run_stage(build_mcq, mcq, **mcq_arguments(rollouts))
    asked = shards.read(mcq, "mcq").to_pylist()
    assert exchange.export_questions(mcq, style, out) == len(asked) > 0
    kept = ("image", "question", "options", "answer_letter")
    assert list(exchange.read_exported(out, style)) == [{k: row[k] for k in kept} for row in asked]
    files = [str(path) for path in shards.paths(out, "train")]
    loaded = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
    row = loaded[0]
    image = row["image"] if style == "visual_rft" else row["images"][0]
    assert image.size == (84, 84), "datasets decodes the image"
    columns = {
        "visual_rft": ["image", "problem", "solution"],
        "easyr1": ["images", "problem", "answer"],
        "verl": ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"],
    }
    assert loaded.column_names == columns[style]


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(StageError, match="visual_rft, easyr1, verl; got 'csv'"):
        exchange.export_questions(tmp_path, "csv", tmp_path / "out")


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
