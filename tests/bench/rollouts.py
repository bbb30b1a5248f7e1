"""Synthetic rollouts for benchmarks: deterministic, and as untidy as a policy's."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_cards import Card
from tasks.tables import schemas, shards

IMAGES_PER_SHARD, SEED = 2000, 0
BASE = 100  # of 200 classes, the first half is trained on
COLOURS = ("Black", "White", "Grey", "Red", "Blue", "Green", "Golden", "Sooty", "Pale", "Crested")
PARTS = ("footed", "throated", "winged", "headed", "bellied")
KINDS = ("Albatross", "Warbler", "Sparrow", "Tern")
SPELLINGS = (
    str,
    str.lower,
    lambda name: name.replace("-", " "),
    lambda name: name.replace(" ", "_"),
    lambda name: f"The {name}.",
    lambda name: f"{name}s",
)


def card() -> Card:
    """200 classes such as "Black-footed Albatross"."""
    names = tuple(f"{c}-{p} {k}" for k in KINDS for c in COLOURS for p in PARTS)
    return Card("bench", 1, "bird", "species", {"kind": "drawn"}, names)


def rows_of(images: int) -> list[dict[str, Any]]:
    """The split's rows of base-class train images, in order."""
    return [{"image_id": f"bench/train/{i:07d}.jpg", "label": i * 7 % BASE} for i in range(images)]


def write_rollouts(folder: Path, images: int, per_image: int) -> None:
    """Rollout shards, images in the order of the split."""
    folder.mkdir(parents=True)
    for index, part in enumerate(shards.chunks(rows_of(images), IMAGES_PER_SHARD)):
        ids = np.repeat([row["image_id"] for row in part], per_image)
        labels = np.repeat([row["label"] for row in part], per_image)
        numbers = np.tile(np.arange(per_image, dtype=np.int32), len(part))
        _write(folder, index, ids, labels, numbers)


def _write(folder: Path, index: int, ids: Any, labels: Any, numbers: Any) -> None:
    rng, count = np.random.default_rng([SEED, index]), len(ids)
    names = card().classes
    texts = np.array(_texts(names), object)
    spelled = len(names) * len(SPELLINGS)
    thoughts = np.array(
        [
            f"The {p} parts look {c.lower()}, so this may be a {k.lower()}."
            for c in COLOURS
            for p in PARTS
            for k in KINDS
        ],
        object,
    )
    draw = rng.random(count)
    # Half of the answers are right, most others are neighbours in the list of classes.
    said = np.where(draw < 0.5, labels, (labels + rng.integers(1, 6, count)) % len(names))
    answer = said * len(SPELLINGS) + rng.integers(0, len(SPELLINGS), count)
    answer = np.where(draw > 0.9, rng.integers(spelled, len(texts), count), answer)
    thought = thoughts[rng.integers(0, len(thoughts), count)]
    # Numbered, so that no two completions are alike; a few lack their tags.
    completions = [
        f"<think>{t} Trait {n}.</think><answer>{a}</answer>" if d < 0.97 else f"{t} {n} {a}"
        for n, (t, a, d) in enumerate(zip(thought, texts[answer], draw, strict=True))
    ]
    table = pa.table(
        {
            "image_id": ids,
            "rollout": numbers,
            "completion": completions,
            "finish_reason": ["stop"] * count,
            "num_tokens": np.full(count, 30, np.int32),
            "mean_logprob": -rng.random(count).astype(np.float32),
        }
    )
    shards.write(shards.shard_path(folder, "rollouts", index), table, schemas.rollouts())


def _texts(names: tuple[str, ...]) -> list[str]:
    """Every class in every spelling, then names of no class and answers that hedge."""
    unknown = [f"{c}-{p} Finch" for c in COLOURS for p in PARTS]
    return [
        *(spell(name) for name in names for spell in SPELLINGS),
        *unknown,
        *(f"{name.lower()}es" for name in unknown),
        *(f"{name} or so" for name in names),
    ]
