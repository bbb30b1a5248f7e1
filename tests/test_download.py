"""Download: what comes in is what a person sees; what cannot be used is named and counted."""

import json
import unicodedata

import pytest

import data_cards
import tasks.ingest.pictures
from tasks.download import download
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage
from tests.ingest.test_pictures import encoded, picture


@pytest.fixture
def photo_card(tmp_path, monkeypatch):
    """A folder card `mine` with two classes of three photographs."""
    for name in ("001.Red_kite", "002.Buzzard"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            data = encoded(picture(size=(40 + i, 30)))
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(data)
    from tasks.draft_card import draft

    cards = tmp_path / "cards"
    cards.mkdir()
    monkeypatch.setattr(data_cards, "FOLDER", cards)
    (cards / "mine.md").write_text(draft("mine", tmp_path / "photos", "bird", "species"))
    (tmp_path / "out").mkdir()
    return tmp_path


def test_a_drafted_card_reads_its_folder(photo_card):
    assert data_cards.load("mine").classes == ("Red kite", "Buzzard")
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    rows = shards.read(photo_card / "out", "images").to_pylist()
    assert [row["image_id"] for row in rows][:2] == [
        "mine/001.Red_kite/0.jpg",
        "mine/001.Red_kite/1.jpg",
    ]
    assert [row["label"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert json.loads((photo_card / "out" / "stats.json").read_text()) == {
        "images": 6,
        "rejected": 0,
        "official_splits": {},
    }


def test_rejects_are_named_and_too_many_fail_the_stage(photo_card):
    bad = photo_card / "photos" / "002.Buzzard" / "notes.jpg"
    bad.write_text("not a photo")
    with pytest.raises(StageError, match=r"1 of 7 files are unusable .*notes.jpg: not an image"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0.1)
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0.2)
    rejected = shards.read(photo_card / "out", "rejects").to_pylist()
    assert [row["path"] for row in rejected] == ["002.Buzzard/notes.jpg"]


def test_files_of_one_stem_in_two_folders_stay_apart(photo_card):
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    ids = shards.read(photo_card / "out", "images")["image_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 6


def test_classes_that_read_alike_are_an_error_naming_both(photo_card):
    card = photo_card / "cards" / "mine.md"
    card.write_text(card.read_text().replace("- Buzzard", "- red-kite"))
    with pytest.raises(StageError, match=r"card mine: 'red-kite' and 'Red kite' are the same"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0)


def test_names_of_folders_may_be_written_in_either_unicode_form(photo_card):
    card = photo_card / "cards" / "mine.md"
    card.write_text(
        card.read_text().replace("Buzzard", "Bussard ä").replace("002.Bussard ä:", "zz:")
    )
    (photo_card / "photos" / "002.Buzzard").rename(
        photo_card / "photos" / unicodedata.normalize("NFD", "Bussard ä")
    )
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    rows = shards.read(photo_card / "out", "images").to_pylist()
    assert sorted(row["label"] for row in rows) == [0, 0, 0, 1, 1, 1]


def test_class_names_are_cleaned_and_those_that_become_one_are_named(photo_card):
    card = photo_card / "cards" / "mine.md"
    card.write_text(card.read_text().replace("- Buzzard", '- "Buzzard \u00a0common. "'))
    assert data_cards.load("mine").classes == ("Red kite", "Buzzard common")
    card.write_text(card.read_text().replace('"Buzzard \u00a0common. "', '"Ｒed  kite."'))
    with pytest.raises(
        data_cards.CardError, match=r"'Red kite' and 'Ｒed  kite\.' are both 'Red kite'"
    ):
        data_cards.load("mine")


def test_a_killed_download_goes_on_and_ends_with_the_same_bytes(photo_card, monkeypatch):
    monkeypatch.setattr("tasks.download.IMAGES_PER_SHARD", 2)
    (photo_card / "photos" / "002.Buzzard" / "1.jpg").write_bytes(b"")
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0.5)
    opened = []
    original = tasks.ingest.pictures.normalise_image

    def dies(data, crop):
        opened.append(data)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return original(data, crop)

    (photo_card / "again").mkdir()
    monkeypatch.setattr("tasks.ingest.pictures.normalise_image", dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage(
            download, photo_card / "again", card="mine", max_reject_share=0.5, decode_threads=1
        )
    opened.clear()
    monkeypatch.setattr(
        "tasks.ingest.pictures.normalise_image", lambda *a: opened.append(a) or original(*a)
    )
    run_stage(download, photo_card / "again", card="mine", max_reject_share=0.5, decode_threads=1)
    assert len(opened) == 4, "the first shard of two is not opened again"
    names = sorted(path.name for path in (photo_card / "out").iterdir())
    assert sorted(path.name for path in (photo_card / "again").iterdir()) == names
    for name in names:
        assert (photo_card / "again" / name).read_bytes() == (
            photo_card / "out" / name
        ).read_bytes()


def test_a_repaired_file_is_opened_again(photo_card):
    bad = photo_card / "photos" / "001.Red_kite" / "1.jpg"
    good = bad.read_bytes()
    bad.write_bytes(b"broken")
    with pytest.raises(StageError, match="1 of 6 files are unusable"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    bad.write_bytes(good)
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    assert shards.read(photo_card / "out", "images").num_rows == 6


@pytest.mark.parametrize("change", ["removed", "added"])
def test_files_that_came_or_went_since_a_run_was_cut_off_are_noticed(
    photo_card, monkeypatch, change, capsys
):
    monkeypatch.setattr("tasks.download.IMAGES_PER_SHARD", 4)
    original = tasks.ingest.pictures.normalise_image
    opened = []

    def dies(*given):
        opened.append(given)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr("tasks.ingest.pictures.normalise_image", dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0, decode_threads=1)
    monkeypatch.setattr("tasks.ingest.pictures.normalise_image", original)
    folder = photo_card / "photos" / "001.Red_kite"
    if change == "removed":
        (folder / "1.jpg").unlink()
    else:
        (folder / "1b.jpg").write_bytes(encoded(picture(size=(50, 30))))
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0, decode_threads=1)
    ids = shards.read(photo_card / "out", "images")["image_id"].to_pylist()
    wanted = [
        p.relative_to(photo_card / "photos") for p in sorted((photo_card / "photos").rglob("*.jpg"))
    ]
    assert ids == [f"mine/{path}" for path in wanted]
    assert "the source has changed" in capsys.readouterr().out


def test_want_of_memory_is_not_taken_for_a_bad_picture(photo_card, monkeypatch):
    def starved(*_):
        raise MemoryError

    monkeypatch.setattr("tasks.ingest.pictures._read", starved)
    with pytest.raises(MemoryError):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=1.0)


def test_other_counts_than_the_official_split_are_told(photo_card, capsys):
    card = photo_card / "cards" / "mine.md"
    card.write_text(card.read_text().replace("classes:", "official_splits: {train: 4}\nclasses:"))
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    assert (
        "usable images: no split; the official split of mine has 4 train" in capsys.readouterr().out
    )


def test_a_class_whose_images_are_all_unusable_is_an_error(photo_card):
    for path in (photo_card / "photos" / "002.Buzzard").iterdir():
        path.write_bytes(b"")
    with pytest.raises(StageError, match=r"no usable image of 1 of 2 classes \(Buzzard\)"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0.9)


def test_an_unknown_folder_and_a_missing_one_are_named(photo_card):
    (photo_card / "photos" / "Kestrel").mkdir()
    with pytest.raises(StageError, match=r"no class 'Kestrel' in card mine"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    (photo_card / "photos").rename(photo_card / "gone")
    with pytest.raises(StageError, match=r"source.path .*photos is not a folder"):
        run_stage(download, photo_card / "out", card="mine", max_reject_share=0)


def test_train_and_test_folders_give_the_official_split(photo_card):
    root = photo_card / "photos"
    for part in ("train", "test"):
        (root / part).mkdir()
    for name in ("001.Red_kite", "002.Buzzard"):
        (root / "train" / name).mkdir()
        (root / "test" / name).mkdir()
        (root / name / "0.jpg").rename(root / "test" / name / "0.jpg")
        (root / name / "1.jpg").rename(root / "train" / name / "1.jpg")
        (root / name / "2.jpg").unlink()
        (root / name).rmdir()
    run_stage(download, photo_card / "out", card="mine", max_reject_share=0)
    rows = shards.read(photo_card / "out", "images").to_pylist()
    assert [(r["official_split"], r["label"]) for r in rows] == [
        ("test", 0),
        ("test", 1),
        ("train", 0),
        ("train", 1),
    ]
