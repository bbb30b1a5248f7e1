"""The report's page: closed to what models and files write, whole without a network, honest in words."""

import json
import re
from pathlib import Path

import pytest

from tasks.engines import policies
from tasks.report import report, summary
from tasks.tables import schemas, shards
from tests.test_report import CLASSES, tree, write_card  # noqa: F401


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

    for row in rows:
        row["split"] = "val" if row["group"] == "base" else "test"
    shards.write(Path(tree["split"]) / "split.parquet", rows, schemas.split(CLASSES))
    report(tmp_path / "both", **tree)
    page = (tmp_path / "both/index.html").read_text(encoding="utf-8")
    assert "(10 of the val images and 10 of the test images of the split)" in page
    assert "were not evaluated" not in page


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


def test_the_base_policys_own_note_stands_on_the_page(tree, tmp_path):
    card = "---\nlicense: mit\nnote: >-\n  Careless on\n  purpose.\n---\n# A policy\n"
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(card)
    (base / "manifest.json").write_text('{"stage": "BasePolicy"}')
    report(tmp_path / "out", **{**tree, "manifests": [str(base / "manifest.json")]})
    assert "The base policy: Careless on purpose." in (tmp_path / "out/index.html").read_text()
    for other in ("", "no front matter", "---\n[1]\n---\n", "---\n: :\n---\n"):
        (base / "README.md").write_text(other)
        assert policies.note(base) == ""


def test_near_misses_and_what_answers_buy_have_sections_of_their_own(tree, tmp_path):
    report(tmp_path / "plain", **tree)
    plain = (tmp_path / "plain/index.html").read_text(encoding="utf-8")
    assert "What so many answers buy" in plain
    assert "Roughly right" not in plain, "the card has no taxonomy"
    card = tmp_path / "toy.md"
    card.write_text(
        card.read_text().replace("classes:", "taxonomy: {Warm: [Beryl, Coral]}\nclasses:")
    )
    report(tmp_path / "grouped", **tree)
    page = (tmp_path / "grouped/index.html").read_text(encoding="utf-8")
    assert "Roughly right" in page
    metrics = json.loads((tmp_path / "grouped/metrics.json").read_text())
    before = metrics["evaluations"][0]
    counted = before["near_misses"]["one_step"]
    assert (counted["images"], counted["wrong"], counted["near"]) == (20, 11, 3)
    assert counted["depth"] == pytest.approx((9 + 3 / 2) / 20)
    assert f"{counted['near']} of {counted['wrong']}" in page
    points = {point["strategy"]: point for point in before["budget_curve"]}
    one_step = before["modes"]["one_step"]
    assert points["one step"]["base"]["low"] == one_step["base"]["accuracy"]
    assert (
        (tmp_path / "grouped/figures/budget.csv").read_text().startswith("policy,strategy,answers")
    )
