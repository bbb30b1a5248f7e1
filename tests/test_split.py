"""Split: every image in exactly one place, base and novel apart, shares drawn alike every time."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingest import split_draws, split_files
from tasks.ingest.split_images import Images
from tasks.runtime.errors import StageError
from tasks.split import find_duplicates, split
from tasks.tables import schemas, shards
from tasks.tables.split_table import base_count
from tests.conftest import run_stage

SHARES = {"test": 0.2, "val": 0.1, "pretrain": 0.4}


def images(per_class: dict[int, int], official: str = "") -> list[dict]:
    return [
        {"image_id": f"set/{label}/{i}", "label": label, "official_split": official}
        for label, count in per_class.items()
        for i in range(count)
    ]


def columns(rows: list[dict]) -> Images:
    """Rows as what Split keeps of them."""
    parts = list(schemas.SPLITS)
    official = [row.get("official_split") or "train" for row in rows]
    return Images(
        ids=pa.array([row["image_id"] for row in rows], pa.string()),
        labels=np.array([row["label"] for row in rows], np.int32),
        official=np.array([parts.index(part) for part in official], np.int16),
        parts=parts,
        pixels=pa.array([row.get("pixels", "") for row in rows]),
        keys=np.array([hash(row.get("pixels", "")) for row in rows]).view(np.uint64),
        dhash=np.array([row.get("dhash", 0) for row in rows], np.int64).view(np.uint64),
    )


def assign(rows: list[dict], num_base: int, *arguments, **named) -> list[dict]:
    """The rows with the group and split that they are given."""
    place = split_draws.assign(columns(rows), num_base, *arguments, **named)
    return [
        {
            "image_id": row["image_id"],
            "label": row["label"],
            "group": "novel" if row["label"] >= num_base else "base",
            "split": schemas.SPLITS[code],
        }
        for row, code in zip(rows, place.tolist(), strict=True)
    ]


def cap(rows: list[dict], count: int, seed: int) -> None:
    """Cap the train images of rows that `assign` gave."""
    place = codes(rows)
    split_draws.cap(columns(rows), place, count, seed)
    for row, code in zip(rows, place.tolist(), strict=True):
        row["split"] = schemas.SPLITS[code]


def follow(rows: list[dict], *arguments) -> None:
    """Give rows their place in a split file as their official split."""
    images = columns(rows)
    split_files.follow(images, *arguments)
    for row, code in zip(rows, images.official.tolist(), strict=True):
        row["official_split"] = schemas.SPLITS[code]


def codes(rows: list[dict]) -> np.ndarray:
    return np.array([schemas.SPLITS.index(row["split"]) for row in rows], np.int16)


@pytest.mark.parametrize(
    ("classes", "base"), [(200, 100), (102, 51), (37, 19), (196, 98), (100, 50), (2, 1)]
)
def test_the_first_half_of_the_classes_rounded_up_is_base(classes, base):
    assert base_count(classes, "base_to_novel") == base
    assert base_count(classes, "all") == classes


@given(st.dictionaries(st.integers(0, 9), st.integers(5, 40), min_size=2), st.integers(0, 99))
def test_every_image_has_one_place_and_novel_classes_are_never_trained_on(per_class, seed):
    rows = assign(images(per_class), 5, SHARES, seed)
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in images(per_class)]
    for row in rows:
        assert row["group"] == ("base" if row["label"] < 5 else "novel")
        assert not (row["group"] == "novel" and row["split"] == "train")
        assert not (row["group"] == "base" and row["split"] == "unused")


@given(st.permutations(images({0: 10, 1: 10})))
def test_the_draw_depends_on_seed_and_class_alone(shuffled):
    def places(rows):
        return {row["image_id"]: row["split"] for row in assign(rows, 1, SHARES, 3)}

    assert places(shuffled) == places(images({0: 10, 1: 10}))


def test_shares_are_drawn_per_class():
    rows = assign(images({0: 20, 1: 10}), 2, SHARES, 0)
    assert Counter(row["split"] for row in rows if row["label"] == 0) == {
        "test": 4,
        "val": 2,
        "pretrain": 8,
        "train": 6,
    }


def test_an_official_test_set_is_kept_and_what_is_missing_is_cut_from_train():
    given_rows = images({0: 10}, "train") + [
        {"image_id": f"set/t{i}", "label": 0, "official_split": "test"} for i in range(5)
    ]
    rows = assign(given_rows, 1, SHARES, 0)
    assert Counter(row["split"] for row in rows) == {"test": 5, "val": 1, "pretrain": 4, "train": 5}


def test_validation_can_be_counted_per_class():
    rows = assign(images({0: 30, 1: 30}, "train"), 1, {"val": 0.5}, 0, val_per_class=6)
    assert Counter((row["label"], row["split"]) for row in rows) == {
        (0, "train"): 24,
        (0, "val"): 6,
        (1, "unused"): 24,
        (1, "val"): 6,
    }


@pytest.mark.parametrize(("shots", "val"), [(1, 1), (4, 4), (16, 4)])
def test_few_shot_keeps_so_many_of_every_class_and_all_of_test(shots, val):
    given_rows = images({0: 30, 1: 20, 2: 3}, "train") + [
        {"image_id": f"set/t{i}", "label": i % 3, "official_split": "test"} for i in range(50)
    ]
    rows = assign(given_rows, 3, {"val": 0.3}, 1, shots=shots)
    counts = Counter((row["label"], row["split"]) for row in rows)
    assert sum(n for (_, part), n in counts.items() if part == "test") == 50
    for label, (train, held) in {0: (21, 9), 1: (14, 6), 2: (2, 1)}.items():
        assert counts[label, "train"] == min(shots, train)
        assert counts[label, "val"] == min(val, held)


def test_few_shot_draws_as_coop_does():
    """One generator over all labels in order of first appearance, train first and then val."""
    import random

    shuffled = images({2: 9, 0: 9, 1: 9}, "train")
    held = [{"image_id": f"set/v{i}", "label": i % 3, "official_split": "val"} for i in range(18)]
    rng = random.Random(3)
    wanted = set()
    for part in (shuffled, held):
        for label in dict.fromkeys(row["label"] for row in part):
            ids = [row["image_id"] for row in part if row["label"] == label]
            wanted |= set(rng.sample(ids, 2))
    rows = assign(shuffled + held, 3, {}, 3, shots=2)
    assert {row["image_id"] for row in rows if row["split"] in ("train", "val")} == wanted


def test_few_shot_draws_the_same_base_images_whether_or_not_there_are_novel_classes():
    rows = images({0: 20, 1: 20, 2: 20, 3: 20}, "train")
    kept = [
        {row["image_id"] for row in assign(rows, base, {}, 2, shots=4) if row["split"] == "train"}
        for base in (2, 4)
    ]
    assert kept[0] == {image_id for image_id in kept[1] if image_id < "set/2"}
    assert len(kept[0]) == 8


def test_a_cap_keeps_as_many_and_spreads_them_over_the_classes():
    rows = assign(images({0: 30, 1: 30, 2: 2}), 3, {"val": 0.1}, 0)
    val = [row["image_id"] for row in rows if row["split"] == "val"]
    cap(rows, 12, 0)
    kept = Counter(row["label"] for row in rows if row["split"] == "train")
    assert sum(kept.values()) == 12
    assert kept[2] == 1, "all the train images it has"
    assert abs(kept[0] - kept[1]) <= 1
    assert [row["image_id"] for row in rows if row["split"] == "val"] == val
    again = assign(images({0: 30, 1: 30, 2: 2}), 3, {"val": 0.1}, 0)
    cap(again, 12, 0)
    assert again == rows
    other = assign(images({0: 30, 1: 30, 2: 2}), 3, {"val": 0.1}, 0)
    cap(other, 12, 1)
    assert other != rows
    cap(rows, 0, 0)
    assert again == rows, "0 is no cap"


def test_a_picture_in_two_splits_is_reported_with_what_it_repeats():
    given = [
        {"image_id": "a", "pixels": "1", "dhash": 0x0F0F0F0F0F0F0F0F, "label": 0},
        {"image_id": "b", "pixels": "1", "dhash": 0x0F0F0F0F0F0F0F0F, "label": 0},
        {"image_id": "c", "pixels": "2", "dhash": 0x0F0F0F0F0F0F0F1F, "label": 1},
        {"image_id": "d", "pixels": "3", "dhash": 0x3333333333333333, "label": 1},
        {"image_id": "e", "pixels": "1", "dhash": 0x0F0F0F0F0F0F0F0F, "label": 0},
    ]
    places = ["train", "test", "val", "test", "unused"]
    rows = [
        {"image_id": g["image_id"], "label": g["label"], "split": s}
        for g, s in zip(given, places, strict=True)
    ]
    (same,) = find_duplicates(columns(given), codes(rows), 0).to_pylist()
    assert same == {
        "image_id": "b", "split": "test", "twin_id": "a", "twin_split": "train",
        "same_class": True, "same_pixels": True, "distance": 0,
    }  # fmt: skip
    near = find_duplicates(columns(given), codes(rows), 2).to_pylist()
    assert [(row["image_id"], row["twin_id"], row["distance"]) for row in near] == [
        ("b", "a", 0),
        ("c", "a", 1),
    ]
    assert near[1]["same_class"] is False


def test_the_stage_writes_what_it_found_and_says_it(split_set, capsys):
    table = shards.read(split_set.download, "images").to_pylist()
    first = {}
    for row in table:
        first.setdefault(row["official_split"], row)
    first["test"]["pixels"] = first["train"]["pixels"]
    out = split_set.root / "twins"
    out.mkdir()
    shards.write(out / "images-00000.parquet", table, schemas.images(split_set.card.classes))
    (split_set.root / "y").mkdir()
    run_stage(
        split,
        split_set.root / "y",
        card="few",
        download=out,
        protocol="all",
        test_share=0.1,
        val_share=0.1,
        pretrain_share=0.1,
        seed=0,
    )
    (row,) = shards.read(split_set.root / "y", "duplicates").to_pylist()
    assert (row["image_id"], row["twin_id"]) == (
        first["test"]["image_id"],
        first["train"]["image_id"],
    )
    assert "split: 1 times the same picture in test and train, such as" in capsys.readouterr().out


def test_the_drawn_card_keeps_its_own_splits(split_set):
    rows = shards.read(split_set.split, "split").to_pylist()
    counts = Counter((row["group"], row["split"]) for row in rows)
    assert counts == {
        ("base", "pretrain"): 40,
        ("novel", "pretrain"): 40,
        ("base", "train"): 60,
        ("novel", "unused"): 60,
        ("base", "val"): 20,
        ("novel", "val"): 20,
        ("base", "test"): 40,
        ("novel", "test"): 40,
    }
    assert len({row["image_id"] for row in rows}) == len(rows) == 320


def test_no_pretrain_share_is_cut_from_a_drawn_set(split_set):
    out = split_set.root / "drawn"
    out.mkdir()
    table = shards.read(split_set.download, "images").to_pylist()
    for row in table:
        if row["official_split"] == "pretrain":
            row["official_split"] = "train"
    shards.write(out / "images-00000.parquet", table, schemas.images(split_set.card.classes))
    (split_set.root / "y").mkdir()
    run_stage(split, split_set.root / "y", card="few", download=out, pretrain_share=0.4, seed=0)
    rows = shards.read(split_set.root / "y", "split").to_pylist()
    assert Counter(row["split"] for row in rows if row["group"] == "base") == {
        "train": 100, "val": 20, "test": 40,
    }  # fmt: skip


def test_a_class_left_without_train_images_is_named(split_set):
    out = split_set.root / "bad"
    out.mkdir()
    table = shards.read(split_set.download, "images").to_pylist()
    for row in table:
        row["official_split"] = "test"
    shards.write(out / "images-00000.parquet", table, schemas.images(split_set.card.classes))
    with pytest.raises(StageError, match="20 classes have no train image"):
        run_stage(
            split,
            split_set.root / "y",
            card="few",
            download=out,
            protocol="base_to_novel",
            test_share=0.1,
            val_share=0.1,
            pretrain_share=0.1,
            seed=0,
        )
