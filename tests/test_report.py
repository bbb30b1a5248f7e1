"""The report tells the truth, on one page that opens offline and that no file can break into."""

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

import data_cards
from tasks.pages.report.lineage import graph_svg
from tasks.pages.text import esc, p_value
from tasks.report import report, summary
from tasks.tables import schemas, shards
from tests.browser import Browser

CLASSES = ("Amber", "Beryl", "Coral", "Denim")
HOSTILE = "<script>alert(1)</script>\x00\x1b[31m\u202e & \"quoted\" 'single' ]]>"
MODES = ("one_step", "majority", "two_step")
REWARDS = ("format", "letter")
# Of 10 test images in each group: how many are right, the first ones of each group.
RIGHT = {"zero_shot": {"base": 4, "novel": 5}, "dive_k": {"base": 8, "novel": 6}}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    monkeypatch.setattr("tasks.pages.figures.ZOOM", 0.25)  # small pictures are soon drawn
    return build_tree(tmp_path)


def test_metrics_are_the_counts_by_hand(tree, tmp_path):
    report(tmp_path / "out", **tree)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    before, after = (e["modes"]["one_step"] for e in metrics["evaluations"])
    assert (before["base"]["correct"], before["base"]["images"]) == (4, 10)
    assert before["base"]["accuracy"] == 0.4
    assert before["base"]["interval"] == pytest.approx([0.1682, 0.6873], abs=1e-3)  # Wilson
    assert after["harmonic_mean"]["accuracy"] == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    change = after["difference"]
    assert change["base"]["mean"] == pytest.approx(0.4)
    assert (change["base"]["won"], change["base"]["lost"]) == (4, 0)
    assert change["base"]["p"] == pytest.approx(0.125)  # four wins, no loss: 2 / 2**4
    assert change["novel"]["mean"] == pytest.approx(0.1)
    expected = 2 * 0.8 * 0.6 / 1.4 - 2 * 0.4 * 0.5 / 0.9
    assert change["harmonic_mean"]["mean"] == pytest.approx(expected)
    assert "difference" not in before
    assert metrics["images"]["groups"] == {"base": 10, "novel": 10}
    assert metrics["seconds"] == 12.5 + 7.5
    assert metrics["rounds"][0]["train"]["steps"] == 30


def test_pictures_in_two_splits_are_told(tree, tmp_path):
    stats = {"duplicates": {"the same picture in test and train": 12}}
    (Path(tree["split"]) / "stats.json").write_text(json.dumps(stats))
    report(tmp_path / "out", **tree)
    page = (tmp_path / "out/index.html").read_text()
    assert "12 images: the same picture in test and train" in page
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["images"]["duplicates"] == stats["duplicates"]


def test_pairing_goes_by_image_id_and_not_by_row_order(tree, tmp_path):
    report(tmp_path / "first", **tree)
    path = Path(tree["evaluations"][1]["path"]) / "predictions.parquet"
    rows = shards.read(path.parent, "predictions").to_pylist()
    shards.write(path, rows[::-1], schemas.predictions(CLASSES))
    report(tmp_path / "second", **tree)
    first, second = (
        json.loads((tmp_path / name / "metrics.json").read_text())["evaluations"][1]["modes"]
        for name in ("first", "second")
    )
    assert first["one_step"] == second["one_step"]


def test_the_same_artifacts_give_the_same_bytes(tree, tmp_path):
    for name in ("first", "second"):
        report(tmp_path / name, **tree)
    for file in ("index.html", "metrics.json"):
        first, second = ((tmp_path / name / file).read_bytes() for name in ("first", "second"))
        assert first == second


@pytest.mark.parametrize("change", ["drop", "repeat"])
def test_evaluations_of_different_images_are_refused(tree, tmp_path, change):
    path = Path(tree["evaluations"][1]["path"]) / "predictions.parquet"
    rows = shards.read(path.parent, "predictions").to_pylist()
    rows = rows[3:] if change == "drop" else rows + rows[:1]
    shards.write(path, rows, schemas.predictions(CLASSES))
    with pytest.raises(ValueError, match=r"same images.*dive_k.*test-0"):
        report(tmp_path / "out", **tree)
    assert not (tmp_path / "out/index.html").exists()


def test_an_evaluation_of_training_images_is_refused(tree, tmp_path):
    rows = shards.read(Path(tree["split"]), "split").to_pylist()
    rows[0]["split"] = "train"
    shards.write(Path(tree["split"]) / "split.parquet", rows, schemas.split(CLASSES))
    with pytest.raises(ValueError, match="a train image"):
        report(tmp_path / "out", **tree)


def test_the_page_is_closed_to_what_models_and_files_write(tree, tmp_path):
    report(tmp_path / "out", **tree)
    raw = (tmp_path / "out/index.html").read_bytes()
    page = raw.decode("utf-8")
    assert "mcq 723" in page  # rows of two shards, added up
    assert "alert(1)" in page  # the text is shown ...
    assert "<script" not in page.lower()  # ... and is only text
    assert not re.search(r"<[^>]+\son\w+\s*=", page)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    assert re.search(r'http-equiv="Content-Security-Policy" content="default-src \'none\';', page)


def test_the_page_needs_nothing_from_outside(tree, tmp_path):
    report(tmp_path / "out", **tree)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["figures", "index.html", "metrics.json"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe", page)
    links = re.findall(r'\shref="([^"]*)"', page)
    assert links
    assert all((tmp_path / "out" / link).is_file() for link in links)
    sources = re.findall(r'\ssrc="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)


def test_every_chart_has_a_title_and_a_description_that_it_names(tree, tmp_path):
    report(tmp_path / "out", **tree)
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    named = re.findall(r'aria-labelledby="(\S+) (\S+)"', page)
    assert len(named) >= 8
    for title, description in named:
        assert re.search(f'<title id="{title}">[^<]+</title>', page)
        assert re.search(f'<desc id="{description}">[^<]+</desc>', page)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_drawn_images_are_called_a_miniature_and_photographs_are_not(tree, tmp_path):
    report(tmp_path / "drawn", **tree)
    assert "miniature" in (tmp_path / "drawn/index.html").read_text(encoding="utf-8")
    write_card(tmp_path, kind="folder")
    report(tmp_path / "photographs", **tree)
    assert "miniature" not in (tmp_path / "photographs/index.html").read_text(encoding="utf-8")


def test_validation_images_are_not_called_test_images(tree, tmp_path):
    rows = shards.read(Path(tree["split"]), "split").to_pylist()
    for row in rows:
        row["split"] = "val"
    shards.write(Path(tree["split"]) / "split.parquet", rows, schemas.split(CLASSES))
    report(tmp_path / "out", **tree)
    text = summary(json.loads((tmp_path / "out/metrics.json").read_text()))
    assert text.startswith("toy: 10 base and 10 novel val images;")
    assert "validation images" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


def test_the_summary_holds_the_numbers_and_needs_metrics_alone(tree, tmp_path):
    report(tmp_path / "out", **tree)
    text = summary(json.loads((tmp_path / "out/metrics.json").read_text()))
    lines = text.splitlines()
    one_step = lines[lines.index("one step") + 1 :]
    assert one_step[0].split()[:4] == ["base", "40.0", "[16.8,", "68.7]"]
    assert "80.0 [" in one_step[0]
    assert "+40.0 [" in one_step[0]
    assert one_step[2].split()[:3] == ["harmonic", "mean", "44.4"]
    assert "two steps" in lines
    assert "DiVE-k helped on base classes; on novel classes the change may be chance." in lines
    assert "\x1b" not in text
    assert max(map(len, lines)) <= 100


def test_a_base_policy_alone_is_reported_without_a_verdict(tree, tmp_path):
    report(tmp_path / "out", **tree | {"evaluations": tree["evaluations"][:1], "rounds": []})
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "nothing to compare" in summary(metrics)


def test_a_protocol_without_novel_classes_has_no_harmonic_mean(tree, tmp_path):
    rows = shards.read(Path(tree["split"]), "split").to_pylist()
    rows = [row | {"group": "base"} for row in rows]
    shards.write(Path(tree["split"]) / "split.parquet", rows, schemas.split(CLASSES))
    report(tmp_path / "out", **tree)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["evaluations"][1]["modes"]["one_step"]) == {"base", "difference"}
    assert "harmonic" not in summary(metrics)


def test_missing_statistics_leave_gaps_and_not_errors(tree, tmp_path):
    entry = tree["rounds"][0]
    log = Path(entry["train"]) / "train_log.parquet"
    pq.write_table(pq.read_table(log)[:0], log)
    for name in ("propose", "build_mcq"):
        (Path(entry[name]) / "stats.json").unlink()
    for item in tree["evaluations"]:
        (Path(item["path"]) / "pass_at_k.json").unlink()
    Path(tree["manifests"][0]).write_text("{}")
    report(tmp_path / "out", **tree)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["rounds"][0]["train"] == {"steps": 0, "seconds": 0, "first": {}, "last": {}}


def test_numbers_that_are_not_finite_stay_out(tree, tmp_path):
    folder = Path(tree["rounds"][0]["train"])
    rows = shards.read(folder, "train_log").to_pylist()
    rows[3] |= {"kl": float("nan"), "reward/letter": float("inf")}
    shards.write(folder / "train_log.parquet", rows, schemas.train_log(REWARDS))
    report(tmp_path / "out", **tree)
    for file in ("metrics.json", "index.html"):
        text = (tmp_path / "out" / file).read_text(encoding="utf-8")
        assert not re.search(r"\b(NaN|nan|Infinity|inf)\b", text)


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
    verdicts = {wrong[0]: True, wrong[1]: None}
    judged = [
        {"image_id": r["image_id"], "mode": "one_step", "status": "", "correct": r["correct"]}
        | {"correct_judged": verdicts.get(r["image_id"], r["correct"])}
        for r in rows
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
    assert metrics["evaluations"][1]["judged"] == {}
    assert "A second opinion" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


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


@pytest.mark.process
def test_the_page_in_a_real_browser(tree, tmp_path):
    cross = [
        {
            "trained_on": "x",
            "set": "toy",
            "method": "dive_k",
            "path": tree["evaluations"][0]["path"],
        }
    ]
    report(tmp_path / "out", **tree, cross=cross, command="luigi")
    page = tmp_path / "out/index.html"
    with Browser(tmp_path / "profile") as browser:
        for width, dark in ((1200, False), (1200, True), (390, False)):
            assert browser.unfold(page, width=width, dark=dark) > 300
            broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
            assert browser.value(broken) == 0
            assert browser.value("document.images.length") == 11
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground))) < 384) == dark
        assert "alert(1)" in browser.value("document.body.innerText")
        seen = "[...document.querySelectorAll('.shown')].filter((c) => c.checkVisibility())"
        assert browser.value(f"{seen}.length") == 6  # three of each kind at first
        choose = "document.querySelector('[name={}]').{}"
        browser.value(choose.format("all", "click()"))
        assert browser.value(f"{seen}.length") == 11
        for name, value in (("class", "1"), ("group", "novel"), ("kind", "won")):
            field = choose.format(name, "value")
            browser.value(f"{field} = '{value}'")
            chosen = browser.value(
                f"{seen}.map((c) => c.dataset.{name} ?? c.parentElement.dataset.kind)"
            )
            assert set(chosen) == {value}
            browser.value(f"{field} = ''")
        printed = tmp_path / "page.pdf"
        browser.pdf(printed)
        assert printed.stat().st_size > 20_000


def build_tree(root: Path) -> dict:
    """A whole run's artifacts, made up; returns the arguments of `report`."""
    write_card(root, kind="drawn")
    places: list[dict] = [
        {
            "image_id": f"toy/test-{index:02d}{'<b>' * (index == 3)}",
            "label": index // 5,
            "class_name": CLASSES[index // 5],
            "group": "base" if index < 10 else "novel",
            "split": "test",
        }
        for index in range(20)
    ]
    for name in ("download", "split", "propose", "build_mcq", "train", *RIGHT):
        (root / name).mkdir()
    shards.write(root / "split/split.parquet", places, schemas.split(CLASSES))
    pictures = [
        {
            "image_id": place["image_id"],
            "image": {"bytes": _png(place["label"]), "path": None},
            "sha256": "",
            "width": 8,
            "height": 8,
            "label": place["label"],
            "official_split": "test",
        }
        for place in places
    ]
    shards.write(root / "download/images-00000.parquet", pictures, schemas.images(CLASSES))
    for name, right in RIGHT.items():
        _write_evaluation(root / name, places, right)
    _write_round(root)
    return {
        "card": "toy",
        "evaluations": [{"name": name, "path": str(root / name)} for name in RIGHT],
        "rounds": [
            {"round": 0} | {name: str(root / name) for name in ("propose", "build_mcq", "train")}
        ],
        "download": str(root / "download"),
        "split": str(root / "split"),
        "manifests": _write_manifests(root),
    }


def write_card(root: Path, kind: str) -> None:
    names = "".join(f"- {name}\n" for name in CLASSES)
    keys = {"drawn": "seed: 0, images_per_class: {test: 5}", "folder": "path: photos"}[kind]
    source = f"source: {{kind: {kind}, {keys}}}"
    (root / "toy.md").write_text(
        f"---\nversion: 1\nnoun: thing\nkind: kind\n{source}\nclasses:\n{names}---\nMade up.\n"
    )


def _write_evaluation(folder: Path, places: list[dict], right: dict[str, int]) -> None:
    predictions, rollouts = [], []
    for index, place in enumerate(places):
        correct = index % 10 < right[place["group"]]
        class_id = place["label"] if correct else (place["label"] + 1) % 4
        for mode in MODES:
            predictions.append(
                {"image_id": place["image_id"], "label": place["label"], "group": place["group"]}
                | {"mode": mode, "options": list(CLASSES) if mode == "two_step" else []}
                | {"completion": HOSTILE, "answer": HOSTILE, "correct": correct}
                | {"class_id": class_id if correct or index % 2 else -1, "status": "<i>exact</i>"}
                | _letters(place["label"], class_id, mode)
                | {"vote_share": 0.75 if mode == "majority" else None}
            )
        for rollout in range(2):
            completion = f"<think></think><answer>{CLASSES[class_id]}</answer>"
            rollouts.append(
                {"image_id": place["image_id"], "rollout": rollout, "completion": completion}
                | {"finish_reason": "stop", "num_tokens": 5, "mean_logprob": -0.1}
            )
    shards.write(folder / "predictions.parquet", predictions, schemas.predictions(CLASSES))
    shards.write(folder / "rollouts-00000.parquet", rollouts, schemas.rollouts())
    curves = {"base": [0.4, 0.6], "novel": [0.5, 0.7], "images": {"base": 10, "novel": 10}}
    (folder / "pass_at_k.json").write_text(json.dumps(curves))


def _letters(label: int, class_id: int, mode: str) -> dict[str, str]:
    chosen, truth = ("ABCD"[i] if mode == "two_step" else "" for i in (class_id, label))
    return {"letter": chosen, "truth_letter": truth}


def _write_round(root: Path) -> None:
    log = schemas.train_log(REWARDS)
    steps = [{name: 0.1 * step for name in log.names} | {"step": step} for step in range(1, 31)]
    shards.write(root / "train/train_log.parquet", steps, log)
    propose: dict = {"rollouts": 40, "pass_at_1": 0.5, "pass_at_n": 0.9, "unparsed": 1}
    propose |= {"finish_reasons": {"stop": 39, "length": 1}, "tokens": 400, "seconds": 3.0}
    (root / "propose/stats.json").write_text(json.dumps(propose))
    built: dict = {"images": 20, "outcomes": {"kept": 15, HOSTILE: 5}, "injected": 3}
    built |= {"letters": {"A": 8, "B": 7}, "option_counts": {"5": 15}, "truth_in_top_k": 16}
    (root / "build_mcq/stats.json").write_text(json.dumps(built))


def _write_manifests(root: Path) -> list[str]:
    recipe: dict = {
        "stage": HOSTILE,
        "fingerprint": "ab" * 32,
        "seconds": 12.5,
        "peak_memory_mb": 900,
    }
    recipe |= {"settings": {"key": HOSTILE, "lone": "\ud800"}, "command": ["python", "\udfff", "x"]}
    recipe |= {
        "versions": {"numpy": "2"},
        "host": {"cpu": HOSTILE, "cores": 2},
        "rows": {"mcq-00000.parquet": 700, "mcq-00001.parquet": 23},
    }
    for name, manifest in {"one": recipe, "two": {"stage": "Train", "seconds": 7.5}}.items():
        (root / f"{name}.json").write_text(json.dumps(manifest))
    return [str(root / "one.json"), str(root / "two.json")]


def _png(label: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (60 * label, 90, 120)).save(buffer, "PNG")
    return buffer.getvalue()
