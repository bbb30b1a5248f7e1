"""What a policy was trained on is told: test images in large letters, and how often votes were wrong."""

import json
import shutil
from pathlib import Path

import pytest

import data_cards
from tasks.compare import compare, tabulate
from tasks.pages.compare_tables import summary as compared
from tasks.questions.trained_on import pseudo_labels
from tasks.report import report, summary
from tasks.tables import schemas, shards
from tests.conftest import mcq_arguments, run_stage, write_rollouts
from tests.test_compare import runs  # noqa: F401
from tests.test_report import tree  # noqa: F401

SAID = "<think>x</think><answer>{}</answer>"
LOUD = "TRAINED ON THE TEST IMAGES"


def question(image_id: str) -> dict:
    """A question without a label, as training without labels has it."""
    return {
        "mcq_id": image_id[-4:],
        "image_id": image_id,
        "image": {"bytes": b"", "path": None},
        "question": "?",
        **{name: [] for name in ("options", "option_class_ids", "option_votes", "option_sources")},
        "answer_letter": "",
        "truth_injected": False,
        "label_differs": False,
        **dict.fromkeys(("truth_share", "margin", "entropy"), 0.0),
    }


def asked(folder: str | Path, image_ids: list[str]) -> None:
    path = shards.shard_path(Path(folder), "mcq", 0)
    shards.write(path, [question(image_id) for image_id in image_ids], schemas.mcq())


def test_a_report_on_test_images_that_were_trained_on_says_so_first(tree, tmp_path):
    first = summary_of(tree, tmp_path / "plain")
    assert LOUD not in first
    assert '<p class="alarm">' not in page(tmp_path / "plain")
    asked(tree["rounds"][0]["build_mcq"], [f"toy/test-{n:02d}" for n in (0, 1, 12)] + ["toy/x"])
    said = summary_of(tree, tmp_path / "loud")
    assert said.startswith(f"{LOUD}: DiVE-k was trained, without labels, on 3 of the images")
    assert f"DiVE-k ({LOUD})" in said, "beside the name"
    text = page(tmp_path / "loud")
    assert text.index(f'<p class="alarm">{LOUD}') < text.index("<h1>")
    assert f"DiVE-k ({LOUD})" in text
    assert f"base policy ({LOUD})" not in text
    assert metrics(tmp_path / "loud")["seen"] == {"evaluated": 3, "novel": 1}


def test_only_images_with_a_completion_were_trained_on(tree, tmp_path):
    first = tree["rounds"][0]
    asked(first["build_mcq"], [f"toy/test-{n:02d}" for n in (0, 1, 12)])
    answers = [
        {
            "step": 1,
            "mcq_id": "x",
            "image_id": f"toy/test-{n:02d}",
            "completion": "?",
            "advantage": 0.0,
        }
        for n in (1, 12, 13)
    ]
    path = shards.shard_path(Path(first["train"]), "completions", 1)
    shards.write(path, answers, schemas.completions([]))
    assert "on 2 of the images" in summary_of(tree, tmp_path / "out"), (
        "and not on one of another set"
    )


def test_unlabelled_images_of_novel_classes_are_told_too(tree, tmp_path):
    rows = shards.read(Path(tree["split"]), "split").to_pylist()
    more = [{**rows[-1], "image_id": f"toy/more-{n}", "split": "unused"} for n in range(4)]
    shards.write(Path(tree["split"]) / "split.parquet", rows + more, schemas.split(CLASSES))
    first = tree["rounds"][0]
    second = {**first, "round": 1, "build_mcq": f"{first['build_mcq']}-1"}
    shutil.copytree(first["build_mcq"], second["build_mcq"])
    tree["rounds"].append(second)
    asked(second["build_mcq"], [row["image_id"] for row in more])
    said = summary_of(tree, tmp_path / "out")
    assert said.startswith("Novel images seen: DiVE-k was trained, without labels, on 4 images")
    assert "DiVE-k (saw novel images)" in said
    assert LOUD not in said


CLASSES = ("Amber", "Beryl", "Coral", "Denim")


def test_a_comparison_marks_the_row_and_says_so_first(runs, tmp_path):
    before = tabulate(runs)
    assert before["warnings"] == []
    last = {"method": "dive_k", "round": None, "seed": 1}
    run = next(run for run in runs if last.items() <= run.items())
    asked(run["build_mcq"][1], [f"{run['set']}/{n:02d}" for n in range(5)])
    found = tabulate(runs)
    name = f"dive_k ({LOUD})"
    assert [row["name"] for row in found["rows"]][2] == name
    (warning,) = found["warnings"]
    assert warning.startswith(f"{LOUD}: DiVE-k was trained, without labels, on 5 of the images")
    for table, plain in zip(found["sets"], before["sets"], strict=True):
        figures = table["modes"]["one_step"][name]["base"]["by_seed"]
        assert figures == plain["modes"]["one_step"]["dive_k"]["base"]["by_seed"]
    assert compared(found).startswith(LOUD)
    compare(tmp_path / "out", runs=runs)
    for file in ("compare.md", "compare.tex", "index.html", "compare.csv"):
        text = (tmp_path / "out" / file).read_text()
        assert f"DiVE-k ({LOUD})" in text or name in text, file
        if file != "compare.csv":
            assert text.index(f"{LOUD}: DiVE-k") < text.index(f"DiVE-k ({LOUD})"), file


def test_wrong_votes_of_training_are_counted_by_group(few_beetles, tmp_path):
    """Groups of completions: right, wrong and tied; one of novel classes cannot be read."""
    names = few_beetles.classes
    rows = {
        "few/a": {"label": 3, "group": "base"},
        "few/b": {"label": 4, "group": "base"},
        "few/c": {"label": 40, "group": "novel"},
        "few/d": {"label": -1, "group": "base"},
    }
    said = {
        "few/a": [names[3], names[3].upper(), names[4], "?"],
        "few/b": [names[3], names[4], "a weevil", "a weevil"],
        "few/c": ["?", "a list, of names", "", "?"],
        "few/d": [names[0]] * 4,
    }
    entry = round_of(tmp_path, {"unlabelled_groups": "base novel"}, {}, said)
    expected = {
        "all": {"questions": 3, "wrong": 1, "none": 1},
        "base": {"questions": 2, "wrong": 1, "none": 0},
        "novel": {"questions": 1, "wrong": 0, "none": 1},
    }
    assert pseudo_labels(entry, rows, few_beetles) == expected, "a tie goes to the lowest class"
    reading = {"reading": {"few": {"vocabulary": "open"}}}
    entry = round_of(tmp_path, {"unlabelled_groups": "base"}, reading, {"few/b": said["few/b"]})
    counts = pseudo_labels(entry, {"few/b": {"label": 3, "group": "base"}}, few_beetles)
    assert counts["all"]["wrong"] == 1, "the most votes are for a name that is no class"
    entry = round_of(
        tmp_path, {"unlabelled_groups": "base"}, reading, {"few/b": said["few/b"][1:3]}
    )
    counts = pseudo_labels(entry, {"few/b": {"label": 4, "group": "base"}}, few_beetles)
    assert counts["all"]["wrong"] == 0, "a tie goes to a class before another name"
    steps = [{"few/b": [names[class_id]] * 2} for class_id in (4, 3)]
    entry = round_of(tmp_path, {"unlabelled_groups": "base"}, {}, *steps)
    counts = pseudo_labels(entry, rows, few_beetles)
    assert counts["all"] == {"questions": 2, "wrong": 1, "none": 0}, "each step votes anew"
    entry = round_of(tmp_path, {"answer_from": "label"}, {}, said)
    assert pseudo_labels(entry, rows, few_beetles) == {}
    assert pseudo_labels({"build_mcq": "", "train": ""}, rows, few_beetles) == {}


def round_of(root: Path, build: dict, train: dict, *steps: dict[str, list[str]]) -> dict:
    for name, settings in (("build_mcq", build), ("train", train)):
        (root / name).mkdir(exist_ok=True)
        (root / name / "manifest.json").write_text(json.dumps({"settings": settings}))
    completions = [
        {"step": step, "image_id": key, "mcq_id": key, "completion": SAID.format(name)}
        | {"advantage": 0.0}
        for step, said in enumerate(steps, 1)
        for key, names in said.items()
        for name in names
    ]
    path = shards.shard_path(root / "train", "completions", 1)
    shards.write(path, completions, schemas.completions([]))
    return {"build_mcq": str(root / "build_mcq"), "train": str(root / "train")}


def test_wrong_votes_of_frozen_questions_are_those_that_differ_from_the_label(split_set):
    from tasks.build_mcq import build_mcq

    names, output = split_set.card.classes, split_set.root / "majority"
    rows = {row["image_id"]: row for row in shards.read(split_set.split, "split").to_pylist()}
    trained = [r for r in rows.values() if (r["group"], r["split"]) == ("base", "train")]
    answers = {
        row["image_id"]: [
            names[row["label"]],
            *[names[(row["label"] + 1) % 20]] * (2 * (n % 3 == 0)),
        ]
        for n, row in enumerate(trained)
    }
    write_rollouts(split_set.root / "propose", answers)
    split_set.propose = split_set.root / "propose"
    output.mkdir()
    changed = {"answer_from": "majority", "top_up": "confusion"}
    run_stage(build_mcq, output, **mcq_arguments(split_set, **changed))
    (output / "manifest.json").write_text(json.dumps({"settings": {"answer_from": "majority"}}))
    entry = {"build_mcq": str(output), "train": str(output)}
    counts = pseudo_labels(entry, rows, data_cards.load("few"))
    stats = json.loads((output / "stats.json").read_text())
    assert counts["all"] == counts["base"]
    assert counts["all"]["wrong"] == stats["answer_differs_from_label"] == len(trained[::3])
    assert counts["all"]["questions"] == stats["outcomes"]["kept"]
    (output / "manifest.json").write_text(json.dumps({"settings": {"answer_from": "label"}}))
    assert pseudo_labels(entry, rows, data_cards.load("few")) == {}


@pytest.mark.parametrize("told", [True, False])
def test_the_page_has_a_table_of_wrong_votes_where_there_were_votes(
    tree, tmp_path, monkeypatch, told
):
    counts = {"all": {"questions": 1200, "wrong": 300, "none": 12}} if told else {}
    monkeypatch.setattr("tasks.questions.trained_on.pseudo_labels", lambda *_: counts)
    report(tmp_path / "out", **tree)
    text = page(tmp_path / "out")
    assert ("How often the majority vote was wrong" in text) == told
    assert ("300 (25.0 %)" in text) == told


def summary_of(tree: dict, output: Path) -> str:
    report(output, **tree)
    return summary(metrics(output))


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def page(output: Path) -> str:
    return (output / "index.html").read_text(encoding="utf-8")
