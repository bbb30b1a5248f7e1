"""Compare: figures against a hand count, refusals, tables that say what the JSON says, the graph."""

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest

from pipeline import tasks as line
from pipeline.settings import SettingsError
from tasks.compare import CompareError, compare, tabulate
from tasks.evaluate import evaluate
from tasks.pages.compare_latex import latex
from tasks.pages.compare_page import compare_page
from tasks.pages.compare_tables import markdown, summary
from tasks.tables import schemas, shards
from tests.browser import Browser
from tests.conftest import evaluate_arguments, run_stage
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed

CLASSES = ("Amber", "Beryl", "Coral", "Denim")
# Right answers of 20 base and 20 novel images, by method and seed.
RIGHT = {
    "zero_shot": [(8, 10), (9, 9)],
    "virft": [(12, 8), (13, 9)],
    "dive_k": [(14, 13), (15, 15)],
    "dive_k, round 0": [(11, 11), (12, 12)],
}
STEPS = {"virft": [8], "dive_k": [4, 4], "dive_k, round 0": [4]}


@pytest.fixture
def runs(tmp_path) -> list[dict]:
    return [*made(tmp_path, "toy"), *made(tmp_path, "pets", shift=1)]


def made(root: Path, name: str, shift: int = 0) -> list[dict]:
    """Evaluations of one set, and the manifests of what they rest on."""
    places = [
        {"image_id": f"{name}/{i:02d}", "label": i // 10, "class_name": CLASSES[i // 10]}
        | {"group": "base" if i < 20 else "novel", "split": "test"}
        for i in range(40)
    ]
    folder = root / name
    (folder / "split").mkdir(parents=True)
    shards.write(folder / "split/split.parquet", places, schemas.split(CLASSES))
    found = []
    for row, by_seed in RIGHT.items():
        method, _, round_ = row.partition(", round ")
        for seed, right in enumerate(by_seed):
            place = folder / f"{row}-{seed}"
            place.mkdir()
            rows = []
            for index, image in enumerate(places):
                correct = index % 20 < right[index // 20] + shift
                rows += [
                    {"image_id": image["image_id"], "label": image["label"], "mode": mode}
                    | {"group": image["group"], "options": [], "completion": "", "answer": ""}
                    | {"class_id": image["label"] if correct else -1, "correct": correct}
                    | {"status": "exact"}
                    for mode in ("one_step", "two_step")
                ]
            shards.write(place / "predictions.parquet", rows, schemas.predictions(CLASSES))
            spent = {"train": [], "propose": [], "build_mcq": []}
            for number, steps in enumerate(STEPS.get(row, [])):
                for stage, rows_of in (
                    ("train", {"train_log": steps}),
                    ("propose", {"rollouts": 80 // len(STEPS[row]) if row == "dive_k" else 40}),
                    ("build_mcq", {"mcq": 30}),
                ):
                    made_by = place / f"{stage}{number}"
                    made_by.mkdir()
                    settings = {"questions_per_step": 6, "num_generations": 4}
                    manifest = {"rows": rows_of, "settings": settings, "seconds": 10}
                    (made_by / "manifest.json").write_text(json.dumps(manifest))
                    spent[stage].append(str(made_by))
            found.append(
                {"set": name, "trained_on": name, "method": method, "seed": seed}
                | {"round": int(round_) if round_ else None, "evaluate": str(place)}
                | {"split": str(folder / "split"), **spent}
            )
    return found


def harmonic(b: float, n: float) -> float:
    return 2 * b * n / (b + n)


def test_figures_are_those_of_a_hand_count(runs):
    found = tabulate(runs)
    toy = found["sets"][0]
    mine = toy["modes"]["one_step"]["dive_k"]
    assert mine["base"]["by_seed"] == pytest.approx([14 / 20, 15 / 20])
    expected = [harmonic(14 / 20, 13 / 20), harmonic(15 / 20, 15 / 20)]
    assert mine["harmonic_mean"]["by_seed"] == pytest.approx(expected)
    assert mine["harmonic_mean"]["mean"] == pytest.approx(sum(expected) / 2)
    change = mine["base"]["difference"]
    assert change["by_seed"] == pytest.approx([6 / 20, 6 / 20])
    # Five images gained with both seeds, two with one: all 2**7 ways to flip, two as extreme.
    assert change["p"] == pytest.approx(2 / 2**7)
    low, high = mine["harmonic_mean"]["interval"]
    assert low < mine["harmonic_mean"]["mean"] < high
    assert toy["images"] == {"base": 20, "novel": 20}
    assert toy["same_images_for_all_seeds"]


def test_p_values_are_adjusted_over_the_datasets_and_named_so(runs):
    found = tabulate(runs)
    entries = [s["modes"]["one_step"]["dive_k"]["base"]["difference"] for s in found["sets"]]
    raw = sorted(entry["p"] for entry in entries)
    adjusted = sorted(entry["p_holm"] for entry in entries)
    assert adjusted == pytest.approx([2 * raw[0], max(2 * raw[0], raw[1])])
    pairs = found["sets"][0]["pairs"]["one_step"]
    assert len(pairs) == 6 * 3, "every two of four rows, for base, novel and their harmonic mean"
    one = next(p for p in pairs if (p["from"], p["to"], p["key"]) == ("virft", "dive_k", "novel"))
    assert one["mean"] == pytest.approx(5.5 / 20)


def test_near_misses_and_answers_an_image_stand_beside_the_accuracy(split_set):
    runs = []
    for seed, method in itertools.product((0, 1), ("zero_shot", "dive_k")):
        folder = split_set.root / f"{method}{seed}"
        folder.mkdir()
        arguments = evaluate_arguments(split_set, modes="one_step two_step") | {"seed": seed}
        run_stage(evaluate, folder, **arguments)
        runs.append(
            {"set": "few", "trained_on": "few", "method": method, "round": None, "seed": seed}
            | {"evaluate": str(folder), "split": str(split_set.split)}
            | {"propose": [], "build_mcq": [], "train": []}
        )
    (table,) = (contents := tabulate(runs))["sets"]
    points = {point["strategy"]: point for point in table["budget_curves"]["dive_k"]}
    figures = table["modes"]["two_step"]["dive_k"]
    assert points["two steps, 4 options"]["base"]["low"] == pytest.approx(figures["base"]["mean"])
    assert points["two steps, 2 options"]["base"]["low"] < points["two steps, 2 options"]["base"]["high"]  # fmt: skip
    near = table["near_misses"]["dive_k"]["one_step"]
    assert 0 < near["share"] < 1
    assert figures["base"]["mean"] / 2 < near["depth"] < 1
    assert f"{100 * near['share']:.1f} / {100 * near['depth']:.1f}" in markdown(contents)
    assert "| DiVE-k | two steps, 2 options |" in markdown(contents)
    assert "What so many answers buy" in compare_page(contents)


def test_a_set_whose_card_has_other_classes_has_neither(runs):
    for table in tabulate(runs)["sets"]:
        assert table["near_misses"] == table["budget_curves"] == {}


def test_both_summaries_over_datasets_stand_under_their_names(runs):
    over = tabulate(runs)["over_datasets"]["one_step"]["dive_k"]
    b = [(14 + 15) / 2 / 20 + 1 / 40] * 2
    assert over["mean_base"]["mean"] == pytest.approx(sum(b) / 2)
    assert over["mean_of_harmonic_means"]["mean"] != over["harmonic_mean_of_means"]["mean"]
    assert "difference" in over["harmonic_mean_of_means"]
    assert tabulate([run for run in runs if run["set"] == "toy"])["over_datasets"] == {}


def test_what_each_method_spent_stands_beside_it_and_inequality_is_told(runs):
    found = tabulate(runs)
    spent = found["budgets"]["toy"]
    assert spent["dive_k"]["optimiser_steps"] == spent["virft"]["optimiser_steps"] == 8
    assert spent["dive_k"]["rollouts"] == 80
    assert spent["virft"]["rollouts"] == 40
    assert spent["dive_k"]["completions"] == 8 * 6 * 4
    assert spent["zero_shot"]["optimiser_steps"] == 0
    assert found["unequal"] == [f"rollouts on {n}: virft 40, dive_k 80" for n in ("toy", "pets")]
    assert "Not equal: rollouts on toy" in markdown(found)


def test_images_that_one_policy_left_out_are_named(runs):
    folder = Path(runs[-1]["evaluate"])
    rows = shards.read(folder, "predictions").to_pylist()[2:]
    shards.write(folder / "predictions.parquet", rows, schemas.predictions(CLASSES))
    with pytest.raises(CompareError, match=r"same images.*'pets/00'"):
        tabulate(runs)


def test_a_method_without_one_of_the_seeds_is_named(runs):
    missing = next(r for r in runs if r["method"] == "virft" and r["seed"] == 1)
    with pytest.raises(CompareError, match="virft was not evaluated on toy with seed 1"):
        tabulate([run for run in runs if run is not missing])


def test_all_tables_say_what_the_json_says(runs, tmp_path):
    for name in ("first", "second"):
        compare(tmp_path / name, runs=runs)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    wanted = ["compare.csv", "compare.json", "compare.md", "compare.tex", "index.html"]
    assert files == wanted
    for name in files:
        first, second = ((tmp_path / n / name).read_bytes() for n in ("first", "second"))
        assert first == second, "the same artifacts give the same bytes"
    found = json.loads((tmp_path / "first/compare.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "first/compare.csv").read_text())))
    for table in found["sets"]:
        for mode, by_row in table["modes"].items():
            for row, figures in by_row.items():
                for key, figure in figures.items():
                    mine = [
                        r
                        for r in rows
                        if (r["set"], r["mode"], r["row"], r["figure"])
                        == (table["set"], mode, row, key)
                    ]
                    assert [float(r["value"]) for r in mine] == pytest.approx(
                        [figure["mean"], *figure["by_seed"]]
                    )
    text = (tmp_path / "first/compare.md").read_text()
    shown = f"{100 * found['sets'][0]['modes']['two_step']['dive_k']['harmonic_mean']['mean']:.1f}"
    assert shown in text
    assert "mean of harmonic means" in text
    assert "harmonic mean of means" in text
    tex = latex(found)
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 5
    for row in re.findall(r"^(?!\\|%)(.+) \\\\$", tex, re.M):
        assert not re.search(r"(?<!\\)[%_#]", row)
    assert "unequal budget" in summary(found)
    page = (tmp_path / "first/index.html").read_text()
    assert "<script" not in page
    assert page.count("<svg") == 4


@pytest.mark.process
def test_the_page_in_a_real_browser(runs, tmp_path):
    compare(tmp_path / "out", runs=runs)
    page = tmp_path / "out/index.html"
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1200, False), (390, True)):
            assert browser.unfold(page, width=width, dark=dark) > 200


def test_seeds_with_splits_of_their_own_are_compared_and_told(runs, tmp_path):
    mine = [run for run in runs if run["set"] == "toy"]
    rows = shards.read(Path(mine[0]["split"]), "split").to_pylist()
    other = tmp_path / "other"
    other.mkdir()
    shards.write(
        other / "split.parquet",
        [row | {"image_id": row["image_id"] + "x"} for row in rows],
        schemas.split(CLASSES),
    )
    for run in mine:
        if run["seed"] == 1:
            run["split"] = str(other)
            folder = Path(run["evaluate"])
            changed = shards.read(folder, "predictions").to_pylist()
            changed = [row | {"image_id": row["image_id"] + "x"} for row in changed]
            shards.write(folder / "predictions.parquet", changed, schemas.predictions(CLASSES))
    table = tabulate(mine)["sets"][0]
    assert not table["same_images_for_all_seeds"]
    assert table["images"] == {"base": 40, "novel": 40}
    assert table["modes"]["one_step"]["dive_k"]["base"]["by_seed"] == pytest.approx([0.7, 0.75])


def test_the_task_evaluates_every_method_seed_and_round_on_the_same_split(config):
    task = line.Compare(dataset="beetles", seeds=[0, 1], by_rounds=["dive_k"], methods=["dive_k"])
    runs = task.arguments()["runs"]
    told = [(r["method"], r["round"], r["seed"]) for r in runs]
    assert told == [
        (method, round_, seed)
        for seed in (0, 1)
        for method, round_ in (("zero_shot", None), ("dive_k", 0), ("dive_k", None))
    ]
    for seed in (0, 1):
        mine = [run for run in runs if run["seed"] == seed]
        assert len({run["split"] for run in mine}) == 1
        assert [len(run["train"]) for run in mine] == [0, 1, 2]
        report = line.Report(dataset="beetles", method="dive_k", seed=seed)
        assert mine[-1]["evaluate"] == str(report.needs()["dive_k"].folder), "made once for both"
    assert task.folder.parent.name == "compare"
    assert task.folder.parent.parent.name == "beetles"


def test_several_datasets_and_mixes_are_told_apart(config):
    task = line.Compare(dataset="beetles", datasets=["pets", "beetles+pets"], seeds=[0])
    sets = {(run["set"], run["trained_on"]) for run in task.arguments()["runs"]}
    assert sets == {("pets", "pets"), ("beetles", "beetles+pets"), ("pets", "beetles+pets")}
    assert task.folder.parent.parent.name == "artifacts"
    other = line.Compare(dataset="cub", datasets=["pets", "beetles+pets"], seeds=[0])
    assert other.fingerprint == task.fingerprint


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"methods": ["dive"]}, "methods: unknown method 'dive'; did you mean dive_k?"),
        ({"methods": [], "by_rounds": ["dive_k"]}, "by_rounds: 'dive_k' is not in methods"),
        ({"seeds": []}, "seeds is empty"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(config, given, told):
    with pytest.raises(SettingsError, match=re.escape(told)):
        line.Compare(dataset="beetles", **given).needs()
