"""The published figures: one place holds them, and every page says the same."""

import csv
import io
import re
from pathlib import Path

import pytest

from tasks.compare import tabulate
from tasks.evaluation import published
from tasks.pages.compare_latex import latex
from tasks.pages.compare_page import compare_page
from tasks.pages.compare_tables import csv_table, markdown, summary
from tasks.tables import schemas, shards
from tests.conftest import ROOT
from tests.test_compare import CLASSES, made, runs  # noqa: F401  a fixture

BOTH = {"base": 20, "novel": 20}


def table(name: str, trained_on: str = "", images: dict | None = None) -> dict:
    return {"set": name, "trained_on": trained_on or name, "images": images or BOTH}


def test_the_harmonic_means_are_those_of_the_means_within_rounding_and_set_effects():
    for row in published.BASE_TO_NOVEL:
        base, novel = row["base"], row["novel"]
        assert row["harmonic_mean"] == pytest.approx(2 * base * novel / (base + novel), abs=0.15)


def test_a_comparison_shows_those_of_its_sets_alone():
    assert published.figures_for([table("toy")]) == []
    rows = published.figures_for([table("toy"), table("pets")])
    assert [row["of"] for row in rows] == ["pets", "pets"] + [published.MEAN] * 3
    assert published.figures_for([table("cub")])[0]["note"].startswith("harmonic mean +14.9")
    assert published.figures_for([table("aircraft")]) == published.BASE_TO_NOVEL
    mix = "+".join(published.SETS)
    assert published.figures_for([table("cub", mix)]) == published.MIXED
    assert published.figures_for([table("cub", "cub+pets")]) == []
    few = table("cub", images={"base": 800})
    assert published.figures_for([few]) == published.FOUR_SHOT


def test_they_stand_beside_ours_in_every_form(runs, tmp_path):
    contents = tabulate(runs)  # of toy and pets
    assert contents["published"] == published.figures_for(contents["sets"])
    assert published.SOURCE in summary(contents)
    for text in (summary(contents), markdown(contents), compare_page(contents), latex(contents)):
        assert "91.6" in text
        assert "79.8" in text
        assert "DiVE-k" in text
        assert published.MEAN in text
    lines = [
        row for row in csv.DictReader(io.StringIO(csv_table(contents))) if row["row"] == "dive_k"
    ]
    values = {
        (row["set"], row["figure"]): row["value"] for row in lines if row["mode"] == "published"
    }
    assert values == {
        ("pets", "harmonic_mean"): "0.916", (published.MEAN, "base"): "0.808",
        (published.MEAN, "novel"): "0.788", (published.MEAN, "harmonic_mean"): "0.798",
    }  # fmt: skip
    alone = tabulate(made(tmp_path / "alone", "toy"))
    for text in (
        summary(alone),
        markdown(alone),
        compare_page(alone),
        latex(alone),
        csv_table(alone),
    ):
        assert "ublished" not in text
        assert "79.8" not in text


def test_the_part_of_the_images_is_named_as_it_is(runs):
    contents = tabulate(runs)
    assert "20 base and 20 novel test images, the same for every method" in summary(contents)
    folder = Path(runs[0]["split"])
    rows = shards.read(folder, "split").to_pylist()
    changed = [{**row, "split": "val" if row["group"] == "base" else "test"} for row in rows]
    shards.write(folder / "split.parquet", changed, schemas.split(CLASSES))
    contents = tabulate(runs)
    assert "20 base val and 20 novel test images, the same for every method" in summary(contents)
    assert "20 base val and 20 novel test images." in compare_page(contents)


def test_the_page_on_the_paper_says_the_same():
    text = (ROOT / "docs/paper.md").read_text()
    for row in published.BASE_TO_NOVEL:
        cells = [published.text(row[key]) for key in ("base", "novel", "harmonic_mean")]
        assert f"(`{row['name']}`) | {' | '.join(cells)} |" in text, row
    for rows in (published.MIXED, published.FOUR_SHOT, published.BY_SET["pets"]):
        for row in rows:
            for key in ("base", "novel", "harmonic_mean"):
                assert key not in row or published.text(row[key]) in text
    assert "14.9" in text
    names = {"cub": "CUB", "flowers": "Flowers", "pets": "Pets", "cars": "Cars"}
    for name, epochs in published.EPOCHS.items():
        assert re.search(rf"{names.get(name, 'Aircraft')}\s+{epochs:g}", text)
        for size in ("7b", "3b"):
            recipe = (ROOT / f"training/recipes/paper_{size}.cfg").read_text()
            assert re.search(
                rf"{names.get(name, 'Aircraft')}\s+{epochs:g}", recipe.replace("#", "")
            )
