"""Split files of others are followed exactly, or refused with a reason."""

import json

import pytest

from data_cards import Card
from tasks.runtime.errors import StageError
from tests.test_split import assign, follow, images

CARD = Card("set", 1, "bird", "species", {"kind": "drawn"}, ("kite", "buzzard"))


def coop_file(path, **parts: list[str]):
    path.write_text(json.dumps({k: [[name, 0, "x"] for name in v] for k, v in parts.items()}))
    return path


def test_a_split_file_of_coop_is_followed_exactly(tmp_path):
    rows = images({0: 4, 1: 3}, "train")
    file = coop_file(
        tmp_path / "s.json", train=["0/0", "1/0", "1/2"], val=["0/3"], test=["0/1", "1/1"]
    )
    follow(rows, file, CARD)
    placed = assign(rows, 2, {}, 0)
    assert {row["image_id"]: row["split"] for row in placed} == {
        "set/0/0": "train",
        "set/0/1": "test",
        "set/0/2": "unused",
        "set/0/3": "val",
        "set/1/0": "train",
        "set/1/1": "test",
        "set/1/2": "train",
    }


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"train": ["0/0"], "val": []}, "is no split file of CoOp's .*test"),
        ({"train": ["0/0"], "val": ["0/0"], "test": []}, "names set/0/0 twice"),
        ({"train": ["0/9"], "val": [], "test": ["0/8"]}, "2 images that card set does not have, '0/9'"),
        ({"train": ["0"], "val": [], "test": []}, "'0' fits set/0/0 and set/1/0"),
    ],
)  # fmt: skip
def test_a_split_file_that_does_not_fit_is_refused(tmp_path, parts, told):
    rows = images({0: 1, 1: 1}, "train")
    if "fits" in told:
        rows = [{**row, "image_id": f"set/{i}/0"} for i, row in enumerate(rows)]
    with pytest.raises(StageError, match=told):
        follow(rows, coop_file(tmp_path / "s.json", **parts), CARD)


def dive_k_folder(folder, **files: list[tuple[str, str]]):
    for name, items in files.items():
        listed = [
            {"image_path": path, "problem": "?", "solution": f"<answer>{answer}</answer>"}
            for path, answer in items
        ]
        (folder / f"{name}.json").write_text(json.dumps(listed))
    (folder / "base_categories.txt").write_text("Kite\n")
    return folder


def test_a_folder_of_the_published_code_is_followed_and_its_val_is_what_is_tested(tmp_path):
    ids = [f"set/CUB/images/{name}/{i}.jpg" for name in ("001.Kite", "002.Buzzard") for i in (0, 1)]
    rows = [
        {"image_id": image_id, "label": "Buzzard" in image_id, "official_split": "test"}
        for image_id in [*ids, "set/CUB/images/001.Kite/9.jpg"]
    ]
    folder = dive_k_folder(
        tmp_path,
        subsample_base_train=[("data/images/001.Kite/0.jpg", "Kite")],
        subsample_base_val=[("data/images/001.Kite/1.jpg", "Kite")],
        subsample_new_val=[("data/images/002.Buzzard/0.jpg", "buzzard")],
    )
    follow(rows, folder, CARD)
    assert [row["official_split"] for row in rows] == ["train", "test", "test", "unused", "unused"]
    dive_k_folder(tmp_path, subsample_new_test=[("002.Buzzard/1.jpg", "buzzard")])
    follow(rows, folder, CARD)
    assert [row["official_split"] for row in rows] == ["train", "val", "val", "test", "unused"]


def test_a_split_file_with_another_class_for_an_image_is_refused(tmp_path):
    rows = images({0: 1, 1: 1}, "train")
    folder = dive_k_folder(tmp_path, a_train=[("0/0", "Buzzard")], a_val=[("1/0", "Buzzard")])
    with pytest.raises(
        StageError, match="says that set/0/0 is 'Buzzard'; card set has it as 'kite'"
    ):
        follow(rows, folder, CARD)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(StageError, match=r"is no split file .*needs .*_train\.json"):
        follow(rows, folder, CARD)


def test_a_listed_image_that_was_unusable_is_told_and_not_an_error(tmp_path, capsys):
    rows = images({0: 1, 1: 2}, "train")
    file = coop_file(tmp_path / "s.json", train=["0/0", "0/1"], val=[], test=["1/0"])
    follow(rows, file, CARD, ["set/0/1"])
    assert [row["official_split"] for row in rows] == ["train", "test", "unused"], "1/1 is another"
    assert "1 of the listed images are unusable: 0/1" in capsys.readouterr().out
