"""The report tells the truth, on one page that opens offline and that no file can break into."""

import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_cards
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
