"""Folders of photographs: split folders by any usual name, and what in them is no photograph."""

import json
import os
import shutil
from pathlib import Path

import pytest

import data_cards
from tasks.download import download
from tasks.draft_card import draft
from tasks.ingest import folders
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage
from tests.ingest.test_pictures import encoded, photograph


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Write a photograph for each path below `photos`; returns the folder."""
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "out").mkdir()

    def make(*paths: str) -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / "photos" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(photograph(number)))
        return tmp_path / "photos"

    return make


def ingested(tmp_path: Path, root: Path, max_reject_share: float = 0.0) -> dict:
    """The counts of Download on the card that is drafted from the folder."""
    (tmp_path / "mine.md").write_text(draft("mine", root, "bird", "species"))
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=max_reject_share)
    return json.loads((tmp_path / "out" / "stats.json").read_text())


def found(root: Path) -> list[tuple[str, str]]:
    return [(s, path.relative_to(root).as_posix()) for s, path in folders.class_folders(root)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "TEST"),
        ("training", "testing"),
        ("train_set", "test_set"),
        ("Training Set", "Test-Set"),
        ("trainset", "valid"),
        ("train_images", "Validation"),
        ("train", "dev"),
    ],
)
def test_split_folders_are_splits_in_any_usual_name_and_case(photos, tmp_path, train, test):
    names = [
        f"{part}/{c}/{i}.jpg" for part in (train, test) for c in ("kite", "crow") for i in "12"
    ]
    root = photos(*names)
    other = "val" if test.lower()[:3] in ("val", "dev") else "test"
    assert {split for split, _ in found(root)} == {"train", other}
    stats = ingested(tmp_path, root)
    assert stats["official_splits"] == {"train": 4, other: 4}
    assert data_cards.load("mine").classes == ("crow", "kite")


@pytest.mark.parametrize(
    "tops",
    [
        ("a", "b"),
        ("fold1", "fold2"),
        ("2021", "2022"),
        ("seen", "unseen"),
        ("kite", "crow", "gull"),
    ],
)
def test_two_folders_with_the_same_subfolders_are_never_two_classes(photos, tmp_path, tops):
    root = photos(*(f"{top}/{c}/1.jpg" for top in tops for c in ("Male", "female", "young")))
    shutil.rmtree(root / tops[1] / "young")
    (root / tops[1] / "Male").rename(root / tops[1] / "male")
    with pytest.raises(StageError, match=r"hold the same subfolders .*name them train/, val/ or"):
        draft("mine", root, "bird", "species")
    (tmp_path / "mine.md").write_text(
        f"---\nversion: 1\nnoun: bird\nkind: species\nsource: {{kind: folder, path: {root}}}\n"
        f"classes: {json.dumps(sorted(tops))}\n---\n"
    )
    with pytest.raises(StageError, match="so they are no classes"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0)


def test_class_folders_with_subfolders_of_their_own_stay_classes(photos):
    root = photos("kite/red/1.jpg", "kite/black/2.jpg", "crow/carrion/1.jpg", "gull/1.jpg")
    assert found(root) == [("", "crow"), ("", "gull"), ("", "kite")]


def test_a_class_called_train_is_a_class_and_a_stray_folder_is_named(photos):
    root = photos("bus/1.jpg", "car/1.jpg", "train/1.jpg")
    assert found(root) == [("", "bus"), ("", "car"), ("", "train")]
    root = photos("Test/bus/1.jpg", "train/bus/1.jpg")  # beside the classes of before
    with pytest.raises(StageError, match=r"bus stands beside Test/; move it away, or"):
        folders.class_folders(root)


def test_what_was_never_a_photograph_is_left_out_and_counted_apart(photos, tmp_path, capsys):
    root = photos(*(f"{c}/{i}.jpg" for c in ("kite", "crow") for i in range(27)), "kite/plain")
    strays = ("Thumbs.db", "desktop.ini", "notes.txt", "IMG_1.MOV", "IMG_1.AAE", "list.csv")
    for name in strays:
        (root / "kite" / name).write_bytes(b"\xd0\xcf\x11\xe0 no photograph")
    (root / "README.md").write_text("beside the classes")
    stats = ingested(tmp_path, root)
    assert (stats["images"], stats["rejected"]) == (55, 0)  # `plain` is a JPEG without a suffix
    assert stats["left_out"] == {"no photographs": 6}
    assert "download: left out, no photographs: 6 (kite/IMG_1.AAE, " in capsys.readouterr().out
    text = (tmp_path / "mine.md").read_text()
    assert "## Left out, no photographs: 6\n\n- `kite/IMG_1.AAE`" in text
    assert "Files that are no usable images" not in text


def test_a_file_that_should_be_a_photograph_is_rejected_with_the_reason(photos, tmp_path):
    root = photos("kite/1.jpg", "crow/1.jpg")
    (root / "kite" / "2.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    (root / "kite" / "3.jpg").write_text("not a photo")
    (root / "kite" / "4.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    (root / "kite" / "5.jpg").symlink_to(tmp_path / "gone.jpg")
    assert ingested(tmp_path, root, max_reject_share=1.0)["rejected"] == 4
    rows = shards.read_file(tmp_path / "out" / "rejects.parquet").to_pylist()
    reasons = {row["path"]: row["reason"] for row in rows}
    assert reasons["kite/2.HEIC"].endswith("convert it to JPEG, as with: heif-convert a.heic a.jpg")
    assert reasons["kite/3.jpg"] == "not an image in a known format"
    assert reasons["kite/4.jxl"].startswith("JPEG XL, which Pillow cannot read; convert it")
    assert reasons["kite/5.jpg"] == "a link to a file that is not there"
    text = (tmp_path / "mine.md").read_text()
    assert "Files that are no usable images: 4" in text
    assert "They are 66.7% of the files. Download refuses more than `[Download] max_reject" in text


def test_photographs_outside_class_folders_and_linked_folders_are_named(photos, tmp_path, capsys):
    root = photos("Train/kite/1.jpg", "Train/crow/1.jpg", "Train/lost.jpg", "loose.png")
    (tmp_path / "elsewhere").mkdir()
    (root / "Train" / "kite" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "Train" / "gull").symlink_to(tmp_path / "on_another_disk")
    stats = ingested(tmp_path, root)
    assert stats["left_out"] == {folders.OUTSIDE: 2, folders.LINKED: 1, folders.BROKEN: 1}
    printed = capsys.readouterr().out
    assert "links beside the class folders that lead nowhere: 1 (Train/gull)" in printed
    assert "photographs outside the class folders: 2 (loose.png, Train/lost.jpg)" in printed
    assert "links to folders, which are not followed: 1 (Train/kite/more)" in printed
    assert (
        "## Left out, photographs outside the class folders: 2"
        in (tmp_path / "mine.md").read_text()
    )


def test_a_file_whose_name_is_not_utf8_is_a_reject_and_a_folder_a_sentence(photos, tmp_path):
    root = photos("kite/1.jpg", "crow/1.jpg", "crow/2.jpg")
    for name in (b"caf\xe9.jpg", b"caf\xe8.jpg"):
        os.link(root / "kite/1.jpg", os.path.join(os.fsencode(root / "kite"), name))
    os.mkdir(os.path.join(os.fsencode(root / "crow"), b"fl\xfcgel"))
    (root / "crow" / os.fsdecode(b"fl\xfcgel") / "3.jpg").write_bytes(encoded(photograph(9)))
    assert ingested(tmp_path, root, max_reject_share=0.5)["rejected"] == 3
    rows = shards.read_file(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert [row["path"] for row in rows] == [
        "crow/fl\\xfcgel/3.jpg",
        "kite/caf\\xe8.jpg",
        "kite/caf\\xe9.jpg",
    ]
    assert {row["reason"] for row in rows} == {"its name is not UTF-8; rename it"}
    os.mkdir(os.path.join(os.fsencode(root), b"g\xe4ns"))
    for step in (draft, None):
        with pytest.raises(
            StageError, match=r"the name of folder g\\xe4ns is not UTF-8; rename it"
        ):
            draft("mine", root, "a", "b") if step else ingested(tmp_path, root)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/v\xf6gel"))
    (root / os.fsdecode(b"g\xe4ns")).rmdir()
    root.rename(odd)
    with pytest.raises(StageError, match=r"udcf6gel' is not UTF-8; rename the folder"):
        draft("mine", odd, "bird", "species")
