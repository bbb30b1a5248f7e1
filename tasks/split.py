"""Split: assigns each image to pretrain, train, val or test, and each class to base or novel.

    python -m tasks.split recipe.json

Base-to-novel (CoOp's rule): by ascending class id the first ceil(n/2) classes are base, the rest
novel. Official splits are kept. Missing splits are drawn from train, stratified by class, with a
generator seeded with (seed, class). Train images of novel classes become `unused`.

Few-shot: every class keeps `shots` train images and min(shots, 4) val images, before classes are
divided into base and novel. Test is never subsampled. Over a split file this is CoOp's own draw
(https://github.com/KaiyangZhou/CoOp), image by image. Without one the rule is the same, but the
order of the images is ours, so the images that it draws are not CoOp's.

A picture that occurs in two splits is reported, not removed: the protocol says which images count.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_cards import load
from tasks.ingest import duplicates
from tasks.ingest.settings import SplitSettings
from tasks.ingest.split_draws import assign, cap
from tasks.ingest.split_files import follow
from tasks.ingest.split_images import Images, read_images
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.protocol import save_stats
from tasks.tables import schemas, shards
from tasks.tables.split_table import base_count

SPLIT_ORDER = ("pretrain", "train", "val", "test")


def split(
    output: Path,
    *,
    card: str,
    download: Path,
    seed: int,
    settings: SplitSettings,
) -> None:
    """Write `split.parquet`: every image of Download with its group and split, exactly once.

    `duplicates.parquet` holds the images that repeat one of an earlier split: with the same pixels,
    or with a difference hash at most `near_duplicates` bits apart. A split file
    (`tasks/ingest/split_files.py`) replaces official splits and shares; no pretrain share is cut
    from a drawn set. Raises StageError when a base class is left without a train image, or any class without a
    test image.
    """
    data_card = load(card)
    images = read_images(download, with_dhash=settings.near_duplicates > 0)
    shares = {
        "test": settings.test_share,
        "val": settings.val_share,
        "pretrain": settings.pretrain_share,
    }
    order = None
    if settings.split_file:
        unusable = download / "rejects.parquet"
        rejects = shards.read_file(unusable)["path"].to_pylist() if unusable.exists() else []
        order = follow(images, Path(settings.split_file).expanduser(), data_card, rejects)
        shares = dict.fromkeys(shares, 0.0)
    elif settings.shots:
        print(
            "split: the few shots are no published draw; that needs a [Split] split_file of CoOp's"
        )
    if data_card.source["kind"] == "drawn":  # it draws what is to be pretrained on
        shares["pretrain"] = 0.0
    num_base = base_count(len(data_card.classes), settings.protocol)
    split_codes = assign(
        images,
        num_base,
        shares,
        seed,
        val_per_class=settings.val_per_class,
        shots=settings.shots,
        order=order,
    )
    cap(images, split_codes, settings.cap(card), seed)
    counts = _counts(images, split_codes, data_card.classes)
    _check(counts, images.parts, data_card.classes, num_base)
    _write(output / "split.parquet", images, split_codes, data_card.classes, num_base)
    summary = ", ".join(
        f"{group} {part} {count}"
        for group, of_group in (("base", counts[:num_base]), ("novel", counts[num_base:]))
        for part, count in sorted(zip(images.parts, of_group.sum(axis=0).tolist(), strict=True))
        if count
    )
    print(
        f"split: {num_base} base and {len(data_card.classes) - num_base} novel classes; {summary}"
    )
    pairs = find_duplicates(images, split_codes, settings.near_duplicates)
    shards.write(output / "duplicates.parquet", pairs, schemas.duplicates())
    kinds = _kinds(pairs)
    save_stats(output, {"duplicates": {kind: row["count_all"] for kind, row in kinds.items()}})
    for kind, row in kinds.items():
        first = f"{row['image_id_first']} and {row['twin_id_first']}"
        print(f"split: {row['count_all']} times {kind}, such as {first}")


def _counts(images: Images, split_codes: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Image counts of shape (classes, splits)."""
    parts = len(images.parts)
    counts = np.bincount(images.labels * parts + split_codes, minlength=len(names) * parts)
    return counts.reshape(-1, parts)


def _check(counts: np.ndarray, parts: list[str], names: tuple[str, ...], num_base: int) -> None:
    """Raise StageError when a base class has no train image, or any class no test image."""
    for part, classes in (("train", num_base), ("test", len(names))):
        lacking = np.flatnonzero(counts[:classes, parts.index(part)] == 0).tolist()
        if lacking:
            examples = ", ".join(names[label] for label in lacking[:5])
            raise StageError(
                f"{len(lacking)} classes have no {part} image ({examples}); give them more images, or "
                f"lower the shares in [Split]"
            )


def _write(
    path: Path, images: Images, split_codes: np.ndarray, names: tuple[str, ...], num_base: int
) -> None:
    with shards.Writer(path, schemas.split(names)) as writer:
        for rows in images.blocks():
            labels = images.labels[rows]
            table = {
                "image_id": images.ids.take(rows),
                "label": labels,
                "class_name": pa.array(names).take(labels),
                "group": pa.array(schemas.GROUPS).take((labels >= num_base).astype(np.int8)),
                "split": pa.array(images.parts).take(split_codes[rows]),
            }
            writer.add_table(pa.table(table))


def find_duplicates(images: Images, split_codes: np.ndarray, near: int) -> pa.Table:
    """The rows of `duplicates.parquet`: images that repeat one of an earlier split.

    Unused images do not count.
    """
    order = [SPLIT_ORDER.index(p) if p in SPLIT_ORDER else -1 for p in images.parts]
    part = np.array(order, np.int8)[split_codes]
    alike = duplicates.repeated(images.keys, among=part >= 0)
    pixels = images.pixels.take(alike).dictionary_encode().indices.to_numpy()
    pairs = duplicates.same(pixels, part[alike])
    pairs = pairs._replace(later=alike[pairs.later], earlier=alike[pairs.earlier])
    if near:
        pairs = duplicates.joined(pairs, duplicates.near(images.dhash, part, near))
    later, earlier, distance = pairs
    named = np.unique(np.concatenate((later, earlier)))
    ids, parts = images.ids.take(named), pa.array(images.parts)
    return pa.table(
        {
            "image_id": ids.take(np.searchsorted(named, later)),
            "split": parts.take(split_codes[later]),
            "twin_id": ids.take(np.searchsorted(named, earlier)),
            "twin_split": parts.take(split_codes[earlier]),
            "same_class": images.labels[later] == images.labels[earlier],
            "same_pixels": distance < 0,
            "distance": np.maximum(0, distance),
        }
    )


def _kinds(pairs: pa.Table) -> dict[str, dict[str, Any]]:
    """Kind of duplicate, in words -> its count and its first pair."""
    kind = ["split", "twin_split", "same_class", "same_pixels"]
    wanted = [([], "count_all"), ("image_id", "first"), ("twin_id", "first")]
    rows = pairs.group_by(kind, use_threads=False).aggregate(wanted).to_pylist()
    return dict(sorted((_kind(row), row) for row in rows))


def _kind(row: dict[str, Any]) -> str:
    likeness = "the same picture" if row["same_pixels"] else "nearly the same picture"
    contradiction = "" if row["same_class"] else " under another class"
    return f"{likeness} in {row['split']} and {row['twin_split']}{contradiction}"


if __name__ == "__main__":
    main(split, short=True)
