"""Split: which image is for pretraining, train, val or test, and which class is base or novel.

    python -m tasks.split CONFIG.json

Base-to-novel (CoOp's rule): classes by ascending class id, the first ceil(n/2) are base, the rest
novel. Official splits are kept; what is missing is cut from train, stratified by class, by a
generator seeded with (seed, class). Train images of novel classes become `unused`.

Few-shot (CoOp's draw, https://github.com/KaiyangZhou/CoOp): of all classes alike, before they are
cut to base and novel, `shots` train images and min(shots, 4) val images stay; test is never
subsampled.

The same picture in two splits is reported, not removed: a protocol says which images count.
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import load
from tasks import schemas, shards
from tasks.duplicates import twins
from tasks.run import StageError, main, save_stats
from tasks.split_files import follow

PROTOCOLS = ("base_to_novel", "all")
MAX_VAL_SHOTS = 4  # as many as CoOp keeps for validation
SPLIT_ORDER = ("pretrain", "train", "val", "test")
MAX_NEAR = 16  # bits of 64; beyond it, pictures that are merely composed alike are near


def split(
    output: Path,
    *,
    card: str,
    download: Path,
    protocol: str,
    test_share: float,
    val_share: float,
    pretrain_share: float,
    seed: int,
    val_per_class: int = 0,
    shots: int = 0,
    split_file: str = "",
    max_train_images: int = 0,
    near_duplicates: int = 0,
) -> None:
    """Write `split.parquet`: every image of Download with its group and split, exactly once.

    `duplicates.parquet` holds the images that show what one of another split shows: the same
    pixels or, with `near_duplicates`, a difference hash of at most so many bits apart.

    Each share is a share of a class's train images and is used only where the source does not
    already say which images are test, val or pretrain. `val_per_class` is a count that takes the
    place of `val_share`, `shots` the number of train images a class keeps; 0: all of them.
    `max_train_images` train images of base classes are kept, spread over the classes; 0: all.
    `split_file` is a split of others (see `tasks/split_files.py`), followed instead of official
    splits and shares. Raises StageError when a class is left without a train (base classes) or test image.
    """
    data_card = load(card)
    if protocol not in PROTOCOLS:
        raise StageError(f"[Split] protocol must be one of {', '.join(PROTOCOLS)}; got {protocol}")
    if min(shots, val_per_class, max_train_images) < 0:
        raise StageError("[Split] shots, val_per_class and train caps must be 0 or more")
    if not 0 <= near_duplicates <= MAX_NEAR:
        raise StageError(
            f"[Split] near_duplicates is a number of bits from 0 to {MAX_NEAR}; got {near_duplicates}"
        )
    if test_share + val_share + pretrain_share >= 1:
        raise StageError("[Split] test_share + val_share + pretrain_share must stay below 1")
    columns = ["image_id", "label", "official_split", "pixels", "dhash"]
    images = shards.read(download, "images", columns).to_pylist()
    shares = {"test": test_share, "val": val_share, "pretrain": pretrain_share}
    if split_file:
        unusable = download / "rejects.parquet"
        rejects = shards.read_file(unusable)["path"].to_pylist() if unusable.exists() else []
        follow(images, Path(split_file).expanduser(), data_card, rejects)
        shares = dict.fromkeys(shares, 0.0)
    num_base = base_count(len(data_card.classes), protocol)
    rows = assign(images, num_base, shares, seed, val_per_class=val_per_class, shots=shots)
    cap(rows, max_train_images, seed)
    for row in rows:
        row["class_name"] = data_card.classes[row["label"]]
    _check(rows, data_card.classes, num_base)
    shards.write(output / "split.parquet", rows, schemas.split(data_card.classes))
    counts = Counter((row["group"], row["split"]) for row in rows)
    told = ", ".join(f"{group} {part} {n}" for (group, part), n in sorted(counts.items()))
    print(f"split: {num_base} base and {len(data_card.classes) - num_base} novel classes; {told}")
    pairs = find_duplicates(images, rows, near_duplicates)
    shards.write(output / "duplicates.parquet", pairs, schemas.duplicates())
    stats = {"duplicates": dict(sorted(Counter(map(_pair, pairs)).items()))}
    save_stats(output, stats)
    for pair, count in stats["duplicates"].items():
        first = next(row for row in pairs if _pair(row) == pair)
        print(f"split: {count} times {pair}, such as {first['image_id']} and {first['twin_id']}")


def find_duplicates(
    images: list[dict[str, Any]], rows: list[dict[str, Any]], near: int
) -> list[dict[str, Any]]:
    """Every image with the one of an earlier split that it repeats; unused images do not count."""
    used = [i for i, row in enumerate(rows) if row["split"] in SPLIT_ORDER]
    found = twins(
        [images[i]["pixels"] for i in used],
        [images[i]["dhash"] for i in used],
        [SPLIT_ORDER.index(rows[i]["split"]) for i in used],
        near,
    )
    pairs = []
    for twin in found:
        row, earlier = rows[used[twin.later]], rows[used[twin.earlier]]
        pairs.append(
            {
                "image_id": row["image_id"],
                "split": row["split"],
                "twin_id": earlier["image_id"],
                "twin_split": earlier["split"],
                "same_class": row["label"] == earlier["label"],
                "same_pixels": twin.distance < 0,
                "distance": max(0, twin.distance),
            }
        )
    return pairs


def _pair(row: dict[str, Any]) -> str:
    likeness = "the same picture" if row["same_pixels"] else "nearly the same picture"
    contradiction = "" if row["same_class"] else " under another class"
    return f"{likeness} in {row['split']} and {row['twin_split']}{contradiction}"


def cap(rows: list[dict[str, Any]], count: int, seed: int) -> None:
    """Keep `count` train images, as evenly over the classes as they allow; the rest is unused."""
    by_class = defaultdict(list)
    for row in rows:
        if row["split"] == "train":
            by_class[row["label"]].append(row)
    if not count or sum(map(len, by_class.values())) <= count:
        return
    for label, members in by_class.items():
        order = np.random.default_rng([seed, label, 1]).permutation(len(members))
        by_class[label] = [members[i] for i in order]
    # One of each class in turn, until there are enough.
    turns = itertools.zip_longest(*(by_class[label] for label in sorted(by_class)))
    for row in [row for turn in turns for row in turn if row][count:]:
        row["split"] = "unused"


def base_count(num_classes: int, protocol: str) -> int:
    """How many classes, by ascending id, are base."""
    return math.ceil(num_classes / 2) if protocol == "base_to_novel" else num_classes


def assign(
    images: list[dict[str, Any]],
    num_base: int,
    shares: dict[str, float],
    seed: int,
    *,
    val_per_class: int = 0,
    shots: int = 0,
) -> list[dict[str, Any]]:
    """Image id, label, group and split of every image, in the order given."""
    place = {row["image_id"]: row["official_split"] or "train" for row in images}
    given = set(place.values())
    by_class = defaultdict(list)
    for row in images:
        if place[row["image_id"]] == "train":
            by_class[row["label"]].append(row["image_id"])
    for label, ids in by_class.items():
        order = np.random.default_rng([seed, label]).permutation(sorted(ids))
        start = 0
        for part, share in shares.items():
            if part in given:
                continue
            count = math.ceil(share * len(order))
            if part == "val" and val_per_class:
                count = val_per_class
            place |= dict.fromkeys(order[start : start + count].tolist(), part)
            start += count
    if shots:
        place |= dict.fromkeys(_left_out(images, place, shots, seed), "unused")
    rows = []
    for row in images:
        novel = row["label"] >= num_base
        part = place[row["image_id"]]
        rows.append(
            {
                "image_id": row["image_id"],
                "label": row["label"],
                "group": "novel" if novel else "base",
                "split": "unused" if novel and part == "train" else part,
            }
        )
    return rows


def _left_out(
    images: list[dict[str, Any]], place: dict[str, str], shots: int, seed: int
) -> list[str]:
    """The train and val images that a few-shot draw does not take.

    One generator for all: labels in order of first appearance, train before val, each label's
    images in the order given. A class with fewer images keeps all of them.
    """
    rng = random.Random(seed)
    left: list[str] = []
    for part, count in (("train", shots), ("val", min(shots, MAX_VAL_SHOTS))):
        by_class: dict[int, list[str]] = defaultdict(list)
        for row in images:
            if place[row["image_id"]] == part:
                by_class[row["label"]].append(row["image_id"])
        for ids in by_class.values():
            kept = set(rng.sample(ids, count) if len(ids) >= count else ids)
            left += [image_id for image_id in ids if image_id not in kept]
    return left


def _check(rows: list[dict[str, Any]], names: tuple[str, ...], num_base: int) -> None:
    have = {(row["label"], row["split"]) for row in rows}
    for part, labels in (("train", range(num_base)), ("test", range(len(names)))):
        if lacking := [names[label] for label in labels if (label, part) not in have]:
            raise StageError(
                f"{len(lacking)} classes have no {part} image ({', '.join(lacking[:5])}); give them "
                f"more images, or lower the shares in [Split]"
            )


if __name__ == "__main__":
    main(split, short=True)
