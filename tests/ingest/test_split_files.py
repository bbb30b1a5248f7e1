"""Split files of others are followed exactly, or refused with a reason."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cards import Card
from tasks.ingest import split_draws, split_files
from tasks.runtime.errors import StageError
from tasks.split import split
from tasks.tables import shards
from tests.conftest import run_stage
from tests.test_split import assign, columns, follow, images

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


# A split file whose order is neither that of the paths nor that of the labels.
FEW = {
    "train": "c/3:7 a/1:2 c/1:7 a/9:2 c/9:7 c/2:7 a/4:2 a/0:2 b/5:0",
    "val": "a/7:2 c/8:7 c/0:7 a/2:2 c/7:7 a/8:2",
    "test": "b/1:0 a/5:2 c/5:7",
}
# What `random.seed(seed)`, then one `random.sample` a label and part, draws of it: two of each class.
DRAWN = {1: "c/1 c/9 a/1 a/9 b/5 + a/7 a/2 c/0 c/7", 2: "c/3 c/2 a/1 a/9 b/5 + a/7 a/2 c/0 c/8"}
FEW_CARD = Card("set", 1, "bird", "species", {"kind": "drawn"}, ("a", "b", "c"))


def few_shots(file, ids: list[str], seed: int, unusable=()) -> dict[str, set[str]]:
    """The train and val images of the draw of two shots, from images in the order of `ids`."""
    rows = columns([{"image_id": f"set/{i}", "label": "abc".index(i[0])} for i in ids])
    order = split_files.follow(rows, file, FEW_CARD, [f"set/{path}" for path in unusable])
    codes = split_draws.assign(rows, 3, {}, seed, shots=2, order=order).tolist()
    return {
        part: {path for path, code in zip(ids, codes, strict=True) if rows.parts[code] == part}
        for part in ("train", "val", "test")
    }


@pytest.mark.parametrize("seed", DRAWN)
def test_few_shots_of_a_split_file_are_those_that_coop_draws(tmp_path, seed, capsys):
    """The draw is over the file's own order, with unusable images, which only then are left out."""
    parts = {
        part: [[name.split(":")[0], int(name.split(":")[1]), "x"] for name in names.split()]
        for part, names in FEW.items()
    }
    file = tmp_path / "split_zhou.json"
    file.write_text(json.dumps(parts))
    train, val = (set(names.split()) for names in DRAWN[seed].split(" + "))
    ids = sorted(path for listed in parts.values() for path, *_ in listed)
    test = {path for path, *_ in parts["test"]}
    assert few_shots(file, ids, seed) == {"train": train, "val": val, "test": test}
    assert few_shots(file, ids[::-1], seed) == {"train": train, "val": val, "test": test}
    assert "lacking" not in capsys.readouterr().out
    unusable = {"a/1", "c/0", "c/2"}
    usable = [path for path in ids if path not in unusable]
    assert few_shots(file, usable, seed, unusable) == {
        "train": train - unusable, "val": val - unusable, "test": test,
    }  # fmt: skip
    lacking = len((train | val) & unusable)
    assert f"{lacking} of the 9 images of the few-shot draw are unusable" in capsys.readouterr().out


@given(st.permutations([f"{name}/{i}" for name in "abc" for i in range(6)]), st.integers(0, 99))
@settings(deadline=None)
def test_few_shots_of_any_split_file_are_coops(tmp_path_factory, listed, seed):
    parts = {"train": listed[:9], "val": listed[9:16], "test": listed[16:]}
    file = tmp_path_factory.getbasetemp() / "any_split.json"
    file.write_text(
        json.dumps({k: [[path, path[0], path[0]] for path in v] for k, v in parts.items()})
    )
    rng, wanted = random.Random(seed), {"test": set(parts["test"])}
    for part in ("train", "val"):
        groups: dict[str, list[str]] = {}
        for path in parts[part]:
            groups.setdefault(path[0], []).append(path)
        kept = [rng.sample(group, 2) if len(group) >= 2 else group for group in groups.values()]
        wanted[part] = {path for group in kept for path in group}
    assert few_shots(file, sorted(listed), seed) == wanted


def test_the_stage_draws_few_shots_from_the_file_and_says_when_they_are_not_coops(
    split_set, tmp_path, capsys
):
    table = shards.read(split_set.download, "images").select(["image_id", "label"]).to_pylist()
    listed = [[row["image_id"], row["label"], "x"] for row in table]
    random.Random(5).shuffle(listed)
    parts = {"train": listed[:200], "val": [], "test": listed[200:]}
    file = tmp_path / "split.json"
    file.write_text(json.dumps(parts))
    rng, groups = random.Random(3), {}
    for path, label, _ in parts["train"]:
        groups.setdefault(label, []).append(path)
    wanted = {path for paths in groups.values() for path in rng.sample(paths, 1)}
    for name, split_file in (("with", str(file)), ("without", "")):
        (tmp_path / name).mkdir()
        run_stage(
            split, tmp_path / name, card="few", download=split_set.download, seed=3,
            protocol="all", shots=1, split_file=split_file,
        )  # fmt: skip
        rows = shards.read(tmp_path / name, "split").to_pylist()
        drawn = {row["image_id"] for row in rows if row["split"] == "train"}
        assert (drawn == wanted) == (name == "with")
        assert ("are no published draw" in capsys.readouterr().out) == (name == "without")
