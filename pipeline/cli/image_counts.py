"""Counts a set's train and test images, or estimates them when Split has not run yet."""

import contextlib
from collections import Counter
from typing import Any

from pipeline.settings import SettingsError
from pipeline.stage import Stage
from tasks.tables import shards
from tasks.tables.schemas import GROUPS
from tasks.tables.split_table import base_count

# Train and test images in CoOp's split files, all classes (dataset table of arXiv 2109.01134).
COOP = {"flowers": (4093, 2463), "pets": (2944, 3669), "cars": (6509, 8041)}


def images_of(stage: Stage) -> dict[str, Any]:
    """The number of train images, of test images by group, and whether it is an estimate."""
    with contextlib.suppress(OSError):
        if stage.folder.is_dir():
            rows = shards.read(stage.folder, "split", ["group", "split"]).to_pylist()
            counts = Counter((row["group"], row["split"]) for row in rows)
            parts = {group: counts[group, "test"] for group in GROUPS}
            return {"train": counts["base", "train"], "test": parts, "how": "counted"}
    card, settings = stage.card, stage.significant()
    classes = len(card.classes)
    share = base_count(classes, settings["protocol"]) / classes
    if settings["split_file"] and stage.dataset in COOP:
        train, test = COOP[stage.dataset]
        how = "estimated from the size of CoOp's split"
    elif card.official_splits:
        train, test = (card.official_splits.get(part, 0) for part in ("train", "test"))
        how = "estimated from the card's official split"
    elif card.source["kind"] == "drawn":
        each = card.source["images_per_class"]
        train, test = (classes * each.get(part, 0) for part in ("train", "test"))
        how = "as the card draws them"
    else:
        raise SettingsError(
            f"the card {stage.dataset} does not say how many images there are; run "
            f"luigi --module pipeline.tasks Split --dataset {stage.dataset} first"
        )
    base = round(train * share)
    if not (settings["split_file"] or card.source["kind"] == "drawn"):
        if not test:
            test = round(train * settings["test_share"])
            base = round(base * (1 - settings["test_share"]))
        if settings["val_per_class"]:
            base -= settings["val_per_class"] * round(classes * share)
        elif "val" not in card.official_splits:
            base = round(base * (1 - settings["val_share"]))
        base = round(base * (1 - settings["pretrain_share"]))
    if settings["shots"]:
        base = min(base, settings["shots"] * round(classes * share))
    if settings["max_train_images"]:
        base = min(base, settings["max_train_images"])
    groups = {"base": round(test * share), "novel": test - round(test * share)}
    return {"train": base, "test": groups, "how": how}
