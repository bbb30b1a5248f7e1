"""A card drafted from a folder of photographs: what is in it, and what is wrong with it."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

import data_cards
from tasks.download import download
from tasks.draft_card import class_names, draft, size_category
from tasks.runtime.errors import StageError
from tests.conftest import ROOT, run_stage
from tests.ingest.test_pictures import encoded, photograph


@pytest.fixture
def birds(tmp_path) -> Path:
    """Two species under train/ and test/, and one of everything that can be wrong."""
    root = tmp_path / "birds"
    number = 0
    for split, count in (("train", 3), ("test", 2)):
        for folder in ("001.Red_kite", "002.Buzzard"):
            (root / split / folder).mkdir(parents=True)
            for i in range(count):
                number += 1
                data = encoded(photograph(number, (300 + number, 200)), quality=95)
                (root / split / folder / f"{i}.jpg").write_bytes(data)
    kites, buzzards = root / "train" / "001.Red_kite", root / "train" / "002.Buzzard"
    (buzzards / "notes.jpg").write_text("seen in May")
    (buzzards / "small.jpg").write_bytes(encoded(photograph(50, (20, 40))))
    (buzzards / "kite.jpg").write_bytes((kites / "0.jpg").read_bytes())
    again = photograph(2, (302, 200)).resize((151, 100))
    (root / "test" / "001.Red_kite" / "resized.jpg").write_bytes(encoded(again, quality=60))
    (root / ".DS_Store").write_text("")
    (kites / ".hidden.jpg").write_text("")
    return root


def test_the_draft_counts_and_names_what_is_there(birds):
    text = draft("my_birds", birds, "bird", "species")
    assert "13 images of 2 classes, 20x40 to 310x200 pixels" in text
    assert "| Red kite | 3 | 3 |" in text
    assert "| Buzzard | 5 | 2 |" in text
    assert (
        "## Files that are no usable images: 1\n\n- `train/002.Buzzard/notes.jpg`: not an" in text
    )
    assert (
        "## Images with a side under 32 pixels: 1\n\n- `train/002.Buzzard/small.jpg`: 20x40" in text
    )
    classes = text.partition("picture in two classes: 1\n\n")[2]
    assert classes.startswith(
        "- `train/002.Buzzard/kite.jpg` and `train/001.Red_kite/0.jpg`: the same"
    )
    splits = text.partition("picture in two splits: 1\n\n")[2]
    assert splits.startswith("- `train/001.Red_kite/1.jpg` and `test/001.Red_kite/resized.jpg`: ")
    assert " of 64 bits apart" in splits


def test_a_card_has_no_method_s_name(birds):
    for name in ("contrast", "zero_shot"):
        with pytest.raises(
            StageError, match=rf"NAME '{name}' is a method's, so that \[Train:{name}"
        ):
            draft(name, birds, "bird", "species")


def test_the_draft_is_a_card_that_downloads_what_it_counted(birds, tmp_path, monkeypatch):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "my_birds.md").write_text(draft("my_birds", birds, "bird", "species"))
    card = data_cards.load("my_birds")
    assert card.classes == ("Red kite", "Buzzard")
    assert card.official_splits == {"train": 8, "test": 5}
    (tmp_path / "out").mkdir()
    run_stage(download, tmp_path / "out", card="my_birds", max_reject_share=0.1)
    assert '"images": 13' in (tmp_path / "out" / "stats.json").read_text()


def test_a_clean_folder_gives_a_card_without_findings(birds):
    for path in ("train/002.Buzzard/notes.jpg", "train/002.Buzzard/small.jpg",
                 "train/002.Buzzard/kite.jpg", "test/001.Red_kite/resized.jpg"):  # fmt: skip
        (birds / path).unlink()
    text = draft("my_birds", birds, "bird", "species")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Images per class"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda root: None, "needs two or more class folders"),
        (
            lambda root: [(root / n).mkdir() for n in ("kite", "Kite")],
            "both read as 'kite'; rename",
        ),
        (lambda root: [(root / n).mkdir() for n in ("kite", "crow")], "no usable image of crow"),
        (lambda root: [(root / n).mkdir() for n in ("train", "crow")], "crow stands beside train/"),
    ],
)
def test_a_folder_that_gives_no_card_says_why(tmp_path, make, told):
    make(tmp_path)
    with pytest.raises(StageError, match=told):
        draft("my_birds", tmp_path, "bird", "species")


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        ("737-800 7-spotted_ladybird 3-series", "737-800;7-spotted ladybird;3-series"),
        ("737-800 747-400 757-200", "737-800;747-400;757-200"),  # all carry one, none is an index
        ("2-spotted 7-spotted 22-spotted", "2-spotted;7-spotted;22-spotted"),
        ("1-series 2-series 3-series", "1-series;2-series;3-series"),
        ("1-800 2-900", "1-800;2-900"),
        ("1.kite crow", "1.kite;crow"),
        ("001.Red_kite 005.Crow 200.Gull", "Red kite;Crow;Gull"),  # part of a longer list
        ("0_kite 1_crow", "kite;crow"),
        ("1-kite 2-crow 10-gull", "1-kite;2-crow;10-gull"),
        ("1.kite 2.crow 3.gull", "kite;crow;gull"),
        ("01-3-series 02-7-spotted", "3-series;7-spotted"),
        ("²kite 2.crow", "2kite;2.crow"),
        ("١.kite ٢.crow", "kite;crow"),  # other digits
    ],
)
def test_a_number_goes_only_where_all_folders_carry_one_as_an_index(tmp_path, folders, classes):
    assert list(class_names(tmp_path, folders.split()).values()) == classes.split(";")


def test_a_name_that_is_no_file_name_is_refused(birds):
    with pytest.raises(StageError, match="NAME 'My Birds' must be lower-case"):
        draft("My Birds", birds, "bird", "species")


@pytest.mark.process
def test_the_command_writes_a_card_once_and_says_what_to_look_at(birds, tmp_path):
    (tmp_path / "cards").mkdir()
    command = [sys.executable, "-m", "tasks.draft_card", "my_birds", str(birds), "--noun", "bird"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "look at    Files that are no usable images: 1" in first.stdout
    assert "make train DATASET=my_birds" in first.stdout
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert "my_birds.md exists; edit it, or choose another name" in again.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "data_cards").glob("*.md")), ids=lambda p: p.stem)
def test_every_card_is_a_hugging_face_dataset_card(path):
    facts = DatasetCard.load(path).data.to_dict()
    assert facts["pretty_name"]
    assert facts["task_categories"] == ["image-classification"]
    assert facts["license"] in ("cc0-1.0", "cc-by-sa-4.0", "other", "unknown")
    assert (facts["license"] == "other") == ("license_name" in facts)
    splits = data_cards.load(path.stem).official_splits
    if splits:
        assert facts["size_categories"] == [size_category(sum(splits.values()))]
