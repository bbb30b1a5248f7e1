"""Counts or estimates the images of a run, and the tokens of its images and prompts, for the plan."""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import data_cards
from pipeline import tasks
from pipeline.methods import method_of
from pipeline.settings import SettingsError
from pipeline.stage import Stage
from tasks.download import IMAGES_PER_SHARD
from tasks.evaluation.settings import parts_of
from tasks.ingest.split_draws import MAX_VAL_SHOTS
from tasks.language import prompts
from tasks.tables import shards
from tasks.tables.schemas import GROUPS
from tasks.tables.split_table import base_count

# Train, val and test images of base and of novel classes in CoOp's split files
# (https://github.com/KaiyangZhou/CoOp; together they are the dataset table of arXiv 2109.01134).
COOP = {
    "flowers": ((1744, 696, 1053), (2349, 937, 1410)),
    "pets": ((1508, 377, 1881), (1436, 359, 1788)),
    "cars": ((3240, 812, 4002), (3269, 823, 4039)),
}
TRAINING, ASKING = "training", "proposals and evaluation"  # stages with pixel limits of their own
PATCH = 28  # pixels: the side of a merged vision token in the Qwen2-VL family


def image_tokens(download: Stage, min_pixels: int, max_pixels: int) -> tuple[int, float]:
    """The tokens of a set's image, at most and on average, within two bounds of its area in pixels.

    Before Download has run, the average is not known, and the largest image stands for it.
    """
    most = max(1, round(max_pixels / PATCH**2))
    with contextlib.suppress(OSError):
        if download.folder.is_dir():
            sizes = shards.read(download.folder, "images", ["width", "height"])
            areas = np.asarray(sizes["width"], float) * np.asarray(sizes["height"], float)
            tokens = np.clip(areas, min_pixels, max_pixels) / PATCH**2
            return max(1, round(float(tokens.max()))), float(tokens.mean())
    return most, float(most)


def images_of(stage: Stage, part: str = "test", total: int = 0) -> dict[str, Any]:
    """All images, train and val ones of base classes, evaluated ones by group, and how it is known.

    `part` is that of [Evaluate]. `total` above 0 is assumed as the number of all images, without
    official splits. `unlabelled` has, by part and group, the images for training without labels: the few
    shots of novel classes are not drawn for it.
    """
    parts = parts_of(part)
    with contextlib.suppress(OSError):
        if stage.folder.is_dir() and not total:
            rows = shards.read(stage.folder, "split", ["group", "split"]).to_pylist()
            counts = Counter((row["group"], row["split"]) for row in rows)
            asked = {group: counts[group, parts[group]] for group in GROUPS}
            unlabelled = {
                "train": {"base": counts["base", "train"], "novel": counts["novel", "unused"]},
                "test": {group: counts[group, "test"] for group in GROUPS},
            }
            known = {"evaluated": asked, "unlabelled": unlabelled, "how": "counted"}
            return {"all": len(rows), **{p: counts["base", p] for p in ("train", "val")}, **known}
    card, settings = stage.card, stage.significant()
    classes = len(card.classes)
    base = base_count(classes, settings["protocol"])
    sizes, how = _estimated(stage, settings, base / classes, total)
    unlabelled = {part: {g: sizes[g][part] for g in GROUPS} for part in ("train", "test")}
    drawn = sum(card.source.get("images_per_class", {}).values()) * classes
    listed = total or drawn or sum(card.official_splits.values())
    everything = listed or sum(sum(of_group.values()) for of_group in sizes.values())
    if shots := settings["shots"]:
        few = {"train": shots, "val": min(shots, MAX_VAL_SHOTS)}
        number = {"base": base, "novel": classes - base}
        sizes = {
            g: {p: min(n, few.get(p, n) * number[g]) for p, n in of_group.items()}
            for g, of_group in sizes.items()
        }
    train = sizes["base"]["train"]
    train = min(train, settings["max_train_images"] or train)
    unlabelled["train"]["base"] = train
    evaluated = {g: sizes[g][parts[g]] for g in GROUPS}
    known = {"evaluated": evaluated, "unlabelled": unlabelled, "how": how}
    return {"all": everything, "train": train, "val": sizes["base"]["val"], **known}


def asked_about(built: Stage, counts: dict[str, Any]) -> int:
    """The images that a stage BuildMCQ asks about; `counts` are those of its set."""
    if not method_of(built.method).unlabelled:
        return counts["train"]
    of_part = counts["unlabelled"][built.settings.unlabelled_part]
    return sum(of_part[group] for group in built.settings.unlabelled)


def shards_of(stages: Sequence[Stage], counts: dict) -> dict[str, int]:
    """Task family -> the number of shards that all of its stages write, at most."""
    numbers: Counter[str] = Counter()
    for stage in stages:
        passes = 1
        if isinstance(stage, tasks.Download):
            images, size = counts[stage.dataset]["all"], IMAGES_PER_SHARD
        elif isinstance(stage, tasks.Evaluate):
            images = sum(counts[stage.set_name]["evaluated"].values())
            size, passes = stage.settings.shard_size, len(stage.settings.mode_names)
        elif isinstance(stage, tasks.Propose | tasks.BuildMCQ):
            images, size = asked_about(stage, counts[stage.set_name]), stage.settings.shard_size
        else:
            continue
        numbers[stage.task_family] += passes * -(-images // size)
    return dict(numbers)


def pictures_gb(stages: Sequence[Stage], counts: dict, image_kb: float) -> dict[str, float | None]:
    """Task id of Download and of each BuildMCQ -> the GB of its images; None where not known.

    BuildMCQ repeats the image of each question. `image_kb` is an image's size in 10^3 bytes; 0: as in
    Download's artifact.
    """
    gb: dict[str, float | None] = {}
    for stage in stages:
        if not isinstance(stage, tasks.Download | tasks.BuildMCQ):
            continue
        name = getattr(stage, "set_name", stage.dataset)
        each, download = image_kb * 1e3, tasks.Download(dataset=name)
        with contextlib.suppress(OSError):
            if not each and download.folder.is_dir():
                files = shards.paths(download.folder, "images")
                each = sum(file.stat().st_size for file in files) / sum(map(shards.num_rows, files))
        own = counts[name]
        count = own["all"] if isinstance(stage, tasks.Download) else asked_about(stage, own)
        gb[stage.task_id] = count * each / 1e9 if each else None
    return gb


def _estimated(
    stage: Stage, settings: dict[str, Any], share: float, total: int
) -> tuple[dict[str, dict[str, int]], str]:
    """Group -> split -> images before few-shot draws and caps, and how they are known.

    `share` is that of the base classes.
    """
    card, names = stage.card, ("train", "val", "test")
    drawn = card.source["kind"] == "drawn" and not total
    official = {} if total else card.official_splits
    if total:
        sizes = {"train": total, "val": 0, "test": 0}
        how = f"of {total:,} that --images assumes"
    elif settings["split_file"] and stage.dataset in COOP:
        of_base, of_novel = (dict(zip(names, part, strict=True)) for part in COOP[stage.dataset])
        if share == 1:
            of_base = {part: count + of_novel[part] for part, count in of_base.items()}
            of_novel = dict.fromkeys(names, 0)
        return {"base": of_base, "novel": of_novel}, "estimated from the size of CoOp's split"
    elif official:
        sizes = {part: official.get(part, 0) for part in names}
        how = "estimated from the card's official split"
    elif drawn:
        each = card.source["images_per_class"]
        sizes = {part: len(card.classes) * each.get(part, 0) for part in names}
        how = "as the card draws them"
    else:
        raise SettingsError(
            f"the card {stage.dataset} does not say how many images there are; run "
            f"luigi --module pipeline.tasks Split --dataset {stage.dataset} first"
        )
    if total or not (settings["split_file"] or drawn):
        if not sizes["test"]:
            sizes["test"] = round(sizes["train"] * settings["test_share"])
            sizes["train"] -= sizes["test"]
        if "val" not in official:
            per_class = settings["val_per_class"] * len(card.classes)
            sizes["val"] = per_class or round(sizes["train"] * settings["val_share"])
            sizes["train"] -= sizes["val"]
        sizes["train"] = round(sizes["train"] * (1 - settings["pretrain_share"]))
    of_base = {part: round(count * share) for part, count in sizes.items()}
    return {"base": of_base, "novel": {p: sizes[p] - of_base[p] for p in names}}, how


def token_counter(
    stages: Sequence[Stage], place: str, chars_per_token: float
) -> tuple[Callable[[str], int], str]:
    """A function that counts a text's tokens, and how: by a tokenizer, else by characters.

    The tokenizer is that in the folder `place`; empty: the policy's, if it is on this machine. Raises
    SettingsError when `place` holds none.
    """
    base = base_of(stages)
    if not place:
        with contextlib.suppress(OSError):
            place = str(base.folder) if base.folder.is_dir() else place
        model = base.settings.model
        if not place and (Path(model).expanduser().is_dir() or _cached(model)):
            place = model
    if not place:
        return (
            lambda text: round(len(text) / chars_per_token),
            f"characters, {chars_per_token:g} a token (no tokenizer here; give --tokenizer)",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"no tokenizer in {place}: {str(error).splitlines()[0]}") from error
    return lambda text: len(tokenizer(text)["input_ids"]), f"the tokenizer in {place}"


def prompt_lengths(
    name: str, stages: Sequence[Stage], count: Callable[[str], int]
) -> dict[str, int]:
    """Tokens of a set's prompts, the largest image included: to propose, to evaluate, and of the question.

    `question` is that of training, and `second` that of evaluation, which may show a larger image.
    """
    card = data_cards.load(name)
    (image, _), (asked_image, _) = image_lengths(name, stages).values()
    number = base_count(len(card.classes), tasks.Split(dataset=name, seed=0).protocol)
    groups = {"base": list(card.classes[:number]), "novel": list(card.classes[number:])}
    engine = tasks.engine().settings
    propose, evaluate = (_of_set(kind, name, stages) for kind in (tasks.Propose, tasks.Evaluate))

    def asked(prompt: str, names: list[str], one_step: bool) -> int:
        style, position = engine.prompt_style, engine.list_position
        texts = prompts.card_question(
            card, prompt, names, style=style, list_position=position, one_step=one_step
        )
        return count("\n".join(texts)) + asked_image

    question = count(longest_question(name, stages))
    return {
        "image": image,
        "propose": asked(propose.settings.prompt, groups["base"], False) if propose else 0,
        "evaluate": max(
            asked(evaluate.settings.prompt, groups[g], "one_step" in evaluate.settings.mode_names)
            for g in GROUPS
            if groups[g]
        ),
        "question": question + image,
        "second": question + asked_image,
    }


def image_lengths(name: str, stages: Sequence[Stage]) -> dict[str, tuple[int, float]]:
    """Tokens of a set's image, at most and on average: in training, and in proposals and evaluation."""
    policy, download = base_of(stages).settings, tasks.Download(dataset=name)
    asked = tasks.engine().settings.max_pixels or policy.max_pixels
    limits = {TRAINING: policy.max_pixels, ASKING: asked}
    return {
        stage: image_tokens(download, policy.min_pixels, most) for stage, most in limits.items()
    }


def longest_question(name: str, stages: Sequence[Stage]) -> str:
    """A multiple-choice question of the set with the longest class names as options."""
    card = data_cards.load(name)
    propose, evaluate = (_of_set(kind, name, stages) for kind in (tasks.Propose, tasks.Evaluate))
    options = propose and tasks.BuildMCQ(**_of(propose)).settings.num_options
    longest = sorted(card.classes, key=len)[-(options or evaluate.settings.num_options) :]
    style = tasks.engine().settings.prompt_style
    return prompts.mcq_question(card.noun, card.kind, longest, style=style)


def averaged(lengths: dict[str, int], images: dict[str, tuple[int, float]]) -> dict[str, int]:
    """The lengths of `prompt_lengths` with an average image in place of the largest."""
    spare = {stage: most - mean for stage, (most, mean) in images.items()}
    trained = ("image", "question")
    return {
        name: round(length - spare[TRAINING if name in trained else ASKING]) if length else 0
        for name, length in lengths.items()
    }


def base_of(stages: Sequence[Stage]) -> Any:
    """The BasePolicy of a graph."""
    return next(s for s in stages if isinstance(s, tasks.BasePolicy))


def _of_set(kind: type[Stage], name: str, stages: Sequence[Stage]) -> Any:
    """The stage of this kind that works on a set, or else the first; None without any."""
    of_kind = [stage for stage in stages if isinstance(stage, kind)]
    return next((s for s in of_kind if s.set_name == name), next(iter(of_kind), None))


def _of(stage: Any) -> dict[str, Any]:
    return {"subset": stage.subset, **tasks.graph(stage)}


def _cached(model: str, file: str = "tokenizer.json") -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, file), str)
    except HFValidationError:
        return False
