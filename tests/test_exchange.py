"""Rollouts from elsewhere come in, questions go out; what comes back is what went out."""

import io
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
from tests.conftest import ROOT, mcq_arguments, on, run_stage


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


@pytest.fixture
def asked(rollouts, tmp_path) -> tuple[Path, list[dict]]:
    """A folder of question shards, and its rows."""
    mcq = tmp_path / "mcq"
    mcq.mkdir()
    run_stage(build_mcq, mcq, **mcq_arguments(rollouts))
    return mcq, shards.read(mcq, "mcq").to_pylist()


def lines(question: str) -> list[str]:
    return [line[3:] for line in question.split("\n")[1:-1]]


def test_visual_rft_and_the_official_trainer_open_it_as_they_open_theirs(asked, tmp_path):
    from datasets import DatasetDict

    out = tmp_path / "out"
    assert exchange.export_questions(asked[0], "visual_rft", out) == len(asked[1]) > 0
    loaded = DatasetDict.load_from_disk(str(out))["train"]
    assert loaded.column_names == ["image", "problem", "solution"]
    assert not list(tmp_path.glob(".export-*"))
    for row, ours in zip(loaded, asked[1], strict=True):
        shown = Image.open(io.BytesIO(ours["image"]["bytes"]))
        assert row["image"].tobytes() == shown.tobytes(), "datasets decodes the image"
        assert lines(row["problem"]) == ours["options"]
        assert row["solution"] == f"<answer>{ours['answer_letter']}</answer>"
        assert "or name" in ours["question"]
        assert "the letter of one option between <answer>" in row["problem"]
        assert "or name" not in row["problem"]


@pytest.mark.parametrize("style", ["easyr1", "verl"])
def test_parquet_is_opened_by_its_readers_own_call(asked, tmp_path, style):
    from datasets import load_dataset

    out = tmp_path / "out"
    assert exchange.export_questions(asked[0], style, out) == len(asked[1])
    files = {"data_dir": str(out)}
    if style == "verl":
        files = {"data_files": [str(path) for path in sorted(out.glob("train-*.parquet"))]}
    loaded = load_dataset("parquet", **files, split="train", cache_dir=str(tmp_path / "c"))
    columns = {
        "easyr1": ["images", "problem", "answer"],
        "verl": ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"],
    }
    assert loaded.column_names == columns[style]
    for number, (row, ours) in enumerate(zip(loaded, asked[1], strict=True)):
        assert row["images"][0].size == (84, 84)
        text = row["problem"] if style == "easyr1" else row["prompt"][0]["content"]
        assert text.startswith("<image>What species of beetle is this?\n")
        assert lines(text) == ours["options"]
        letter = row["answer"] if style == "easyr1" else row["reward_model"]["ground_truth"]
        assert letter == ours["answer_letter"]
        if style == "verl":
            assert row["extra_info"]["index"] == number


def test_verl_finds_the_reward_function_and_it_scores_what_was_exported(asked, tmp_path):
    """verl loads the file by its path, and calls the function with these names."""
    import importlib.util

    from datasets import load_dataset

    spec = importlib.util.spec_from_file_location("custom_module", ROOT / "tasks/verl_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exchange.export_questions(asked[0], "verl", tmp_path / "out")
    files = [str(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    row = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))[0]
    given = {"data_source": row["data_source"], "extra_info": row["extra_info"]}
    given |= {"ground_truth": row["reward_model"]["ground_truth"]}
    truth = row["extra_info"]["options"][ord(given["ground_truth"]) - ord("A")]
    wrong = next(name for name in row["extra_info"]["options"] if name != truth)
    for text, score in [
        (f"<think>?</think><answer>{given['ground_truth']}</answer>", 2),
        (f"<think>?</think><answer>{truth}</answer>", 2),
        (f"<think>?</think><answer>{wrong}</answer>", 1),
        (f"<answer>{truth}</answer>", 1),
        ("no tags", 0),
    ]:
        assert module.compute_score(solution_str=text, **given) == score, text


@pytest.mark.parametrize("style", exchange.FORMATS)
def test_of_an_open_question_the_name_is_the_solution(split_set, tmp_path, style):
    from datasets import DatasetDict

    from tasks.build_open import build_open
    from tasks.verl_reward import compute_score

    folder, out = tmp_path / "open", tmp_path / "out"
    folder.mkdir()
    arguments = {**on(split_set), "prompt_style": "brief", "prompt": "open", "shard_size": 50}
    del arguments["seed"]
    build_open(folder, **arguments, seed=0)
    exchange.export_questions(folder, style, out)
    ours = shards.read(folder, "mcq").to_pylist()[0]
    if style == "visual_rft":
        row = DatasetDict.load_from_disk(str(out))["train"][0]
        assert (row["problem"], row["solution"]) == (
            ours["question"],
            f"<answer>{ours['options'][0]}</answer>",
        )
        return
    row = next(iter(shards.iter_rows(out, "train")))
    if style == "easyr1":
        assert row["answer"] == ours["options"][0]
        return
    text = f"<think>?</think><answer>{ours['options'][0].upper()}</answer>"
    truth = row["reward_model"]["ground_truth"]
    assert compute_score("few", text, truth, row["extra_info"]) == 2
    assert compute_score("few", text.replace("ans", "xns"), truth, row["extra_info"]) == 0
    assert compute_score("few", "<think>?</think><answer>A</answer>", truth, row["extra_info"]) == 1


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
