"""Sources: the images of a list from any place on, and the files of a folder in one order."""

import hashlib
import json

import pytest

from tasks.ingest import folders, sources
from tasks.runtime.errors import StageError


@pytest.fixture
def listed(few_beetles, monkeypatch):
    """A source of a list of 100 images, packed seven at a time."""
    monkeypatch.setattr(sources, "ROWS", 7)
    found = [(f"a/{n:03d}.png", n % 40, ["", "train"][n % 2]) for n in range(100)]
    return sources.listing(
        few_beetles, iter(found), lambda path, label: f"{path} {label}".encode(), 3
    ), found


@pytest.mark.parametrize("start", [0, 1, 6, 7, 50, 97, 98, 99, 100])
def test_a_list_is_gone_through_from_any_place_on(listed, start):
    source, found = listed
    items = list(source.items(start))
    assert source.total == 100
    assert [(i.path, i.label, i.official_split) for i in items] == found[start:]
    assert [item.load() for item in items] == [f"{p} {n}".encode() for p, n, _ in found[start:]]
    assert {item.crop_bottom for item in items} <= {3}


def test_the_digest_of_a_stretch_is_of_its_rows_however_they_are_kept(listed):
    source, found = listed
    rows = [dict(zip(("path", "label", "split"), row, strict=True)) for row in found[5:25]]
    assert source.digest(5, 25) == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert source.digest(90, 200) == source.digest(90, 100) != source.digest(90, 99)


def test_a_list_without_an_image_of_a_class_is_refused(few_beetles):
    found = [(f"{n}.png", n, "") for n in range(39)]
    with pytest.raises(StageError, match="no image of 1 of 40 classes"):
        sources.listing(few_beetles, found, lambda path, label: b"")


def test_the_files_of_a_folder_come_sorted_part_by_part_and_hidden_ones_not(tmp_path):
    """What stands in a folder comes where the folder's name stands, before `a.png` and `a-b`."""
    top = tmp_path / "top"
    for name in ("b.png", "a/z.png", "a/c/1.png", "a-b/1.png", "a.png", ".x/1.png", "a/.y", "c/d/"):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"") if not name.endswith("/") else path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.png").write_bytes(b"")
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (top / "near.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (top / "nowhere.png").symlink_to(tmp_path / "gone")
    found = [path.relative_to(top).as_posix() for path in folders.files_below(top)]
    assert found == [
        "a/c/1.png",
        "a/z.png",
        "a-b/1.png",
        "a.png",
        "b.png",
        "linked",
        "near.png",
        "nowhere.png",
    ]
