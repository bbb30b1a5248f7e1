"""The report's figures and tables: every one as SVG, PNG and CSV, with the values of metrics.json."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.pages.report.lineage import graph_svg
from tasks.pages.text import esc, p_value
from tasks.report import report
from tasks.tables import shards
from tests.test_report import tree  # noqa: F401


def test_every_figure_is_there_as_svg_png_and_csv(tree, tmp_path):
    report(tmp_path / "out", **tree)
    folder = tmp_path / "out/figures"
    keys = {path.stem for path in folder.iterdir()}
    assert {"accuracy-one_step", "pass-base", "log-reward", "letters"} <= keys
    for key in keys:
        drawn = ElementTree.fromstring((folder / f"{key}.svg").read_text(encoding="utf-8"))
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in (folder / f"{key}.svg").read_text(encoding="utf-8")
        with Image.open(folder / f"{key}.png") as picture:
            colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours
        assert len(colours) > 10, f"{key}.png shows nothing"
        assert len((folder / f"{key}.csv").read_text(encoding="utf-8").splitlines()) > 1
    rows = list(csv.DictReader(io.StringIO((folder / "accuracy-one_step.csv").read_text())))
    told = {(r["policy"], r["group"]): float(r["accuracy"]) for r in rows}
    assert told["zero_shot", "base"] == 0.4
    assert told["dive_k", "novel"] == 0.6


def test_letters_and_votes_are_shown_as_the_metrics_have_them(tree, tmp_path):
    report(tmp_path / "out", **tree)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out/figures/letters.csv").read_text())))
    for evaluation in metrics["evaluations"]:
        told = evaluation["letters"]
        assert told["questions"] == 20
        assert f"20 questions (two steps), chi-square p {esc(p_value(told['p']))}" in page
        drawn = {r["letter"]: float(r["bias"]) for r in rows if r["policy"] == evaluation["name"]}
        assert drawn == {letter: each["bias"] for letter, each in told["letters"].items()}
        assert evaluation["calibration"]["bins"][0]["vote_share"] == 0.75


def test_confusions_and_classes_are_counted_by_hand(tree, tmp_path):
    report(tmp_path / "out", **tree)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    # Of the six base images that were wrong four are right now; odd ones named the next class.
    pairs = {(p["truth"], p["answer"]): p for p in metrics["confusions"]["resolved"]}
    assert pairs["Beryl", "Coral"]["before"] - pairs["Beryl", "Coral"]["after"] == 2
    assert metrics["confusions"]["introduced"] == []
    amber = next(row for row in metrics["classes"] if row["class"] == "Amber")
    assert amber == {"class": "Amber", "group": "base", "right": [4, 5], "images": 5}


def test_policies_of_other_sets_stand_in_a_table(tree, tmp_path):
    cross = [
        {"trained_on": "birds", "set": "toy", "method": name, "path": item["path"]}
        for name, item in zip(("dive_k", "virft"), tree["evaluations"], strict=True)
    ]
    report(tmp_path / "out", **tree, cross=cross)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert [entry["trained_on"] for entry in metrics["cross"]] == ["birds", "birds"]
    figure = metrics["evaluations"][0]["modes"]["one_step"]["harmonic_mean"]
    assert metrics["cross"][0]["figure"] == figure
    assert "trained on birds" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


def test_a_judges_opinion_stands_beside_the_first_and_not_in_its_place(tree, tmp_path):
    rows = shards.read(Path(tree["evaluations"][0]["path"]), "predictions").to_pylist()
    rows = [row for row in rows if row["mode"] == "one_step"]
    wrong = [row["image_id"] for row in rows if not row["correct"] and row["group"] == "base"]
    right = next(r["image_id"] for r in rows if r["correct"] and r["group"] == "novel")
    verdicts = {wrong[0]: True, wrong[1]: None, right: False}
    judged = [
        {"image_id": r["image_id"], "mode": "one_step", "status": "", "correct": r["correct"]}
        | {"correct_judged": verdicts.get(r["image_id"], r["correct"])}
        | {"judged": verdicts.get(r["image_id"], r["correct"])}
        for r in rows
    ]
    samples = {"mode": "rollouts", "status": "", "correct": False, "judged": None}
    judged += [  # two samples of two images: one that the judge alone calls right, one without a verdict
        {**samples, "image_id": image_id, "correct_judged": verdict}
        for image_id, verdict in [
            (wrong[0], True),
            (wrong[0], False),
            (wrong[1], None),
            (wrong[1], False),
        ]
    ]
    (tmp_path / "judge").mkdir()
    pq.write_table(pa.Table.from_pylist(judged), tmp_path / "judge/judgements.parquet")
    given = [{"name": "zero_shot", "path": str(tmp_path / "judge")}]
    report(tmp_path / "out", **tree, judged=given)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    first = metrics["evaluations"][0]
    assert first["modes"]["one_step"]["base"]["correct"] == 4
    assert first["judged"]["one_step"]["base"]["correct"] == 5
    assert first["judged"]["one_step"]["base"]["undecided"] == 1
    base, novel, both = (first["judged"]["one_step"][k] for k in ("base", "novel", "harmonic_mean"))
    assert (base["names_alone"], base["judge_alone"]) == (0, 1)
    assert (novel["names_alone"], novel["judge_alone"]) == (1, 0)
    verdicts_of = {
        group: figures["images"] for group, figures in (("base", base), ("novel", novel))
    }
    assert base["verdicts"] == verdicts_of["base"] - 1
    assert base["agreement"] == pytest.approx(1 - 1 / base["verdicts"])
    assert both["agreement"] == pytest.approx(1 - 2 / (base["verdicts"] + novel["verdicts"]))
    rates = [base["accuracy"], novel["accuracy"]]
    assert both["accuracy"] == pytest.approx(2 * rates[0] * rates[1] / sum(rates))
    assert metrics["evaluations"][1]["judged"] == metrics["evaluations"][1]["judged_pass"] == {}
    assert first["judged_pass"] == {"base": {"1": {"strict": 0.0, "judged": 0.25}}}
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    second = page[page.index("A second opinion") :]
    assert '<td class="n">0.0</td><td class="n">25.0</td>' in second
    assert f">{100 * both['agreement']:.1f}</td>" in second[: second.index("</table>")]


def test_every_column_of_the_log_is_drawn_and_none_is_needed(tree, tmp_path):
    folder = Path(tree["rounds"][0]["train"])
    rows = [
        {
            "step": n,
            "reward/letter": 0.5,
            "reward/<b>": 1.0,
            "val_accuracy": 0.4 if n % 5 == 0 else None,
        }
        | {"something_new": 1.0 * n, "seconds": 1.0}
        for n in range(1, 21)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train_log.parquet")
    report(tmp_path / "out", **tree)
    keys = {path.stem for path in (tmp_path / "out/figures").glob("log-*.svg")}
    assert keys == {
        "log-reward",
        "log-validation-accuracy",
        "log-seconds-a-step",
        "log-something-new",
    }
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "<b>)" not in page
    assert "&lt;b&gt;" in page


def test_the_graph_shows_what_was_made_from_what(tree, tmp_path):
    report(tmp_path / "out", **tree, command="luigi --module pipeline.tasks <it>")
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "luigi --module pipeline.tasks &lt;it&gt;" in page
    stages = [
        {"stage": "Download", "fingerprint": "a", "inputs": {}},
        {"stage": "Split", "fingerprint": "b", "inputs": {"download": "a"}},
        {"stage": "Train", "fingerprint": "c", "inputs": {"download": "a", "split": "b"}},
    ]
    drawn = graph_svg(stages)
    assert drawn.count('class="box"') == 3
    assert drawn.count('class="edge"') == 2, "what a longer way says needs no line of its own"
    tops = [float(y) for y in re.findall(r'class="box" x="[\d.]+" y="([\d.]+)"', drawn)]
    assert tops == sorted(tops)
