"""Synthetic pictures, artifacts and rollouts for benchmarks; the rollouts are as untidy as a policy's.

All are deterministic, and the artifacts are written by the project's own writers.
"""

import io
import random
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_cards import Card
from tasks.engines.base import Completion, Request, Sampling
from tasks.tables import schemas, shards

IMAGES_PER_SHARD, SEED = 2000, 0
LATENCY = 0.2  # seconds that the engine without a model takes for a shard
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


@cache
def card() -> Card:
    """200 classes such as "Black-footed Albatross"."""
    names = tuple(f"{c}-{p} {k}" for k in KINDS for c in COLOURS for p in PARTS)
    return Card("bench", 1, "bird", "species", {"kind": "drawn"}, names)


def write_card(folder: Path, path: Path | str) -> None:
    """The card as `cards/bench.md` below `folder`, with the folder of photographs as its source."""
    names = "".join(f"  - {name}\n" for name in card().classes)
    (folder / "cards").mkdir(exist_ok=True)
    (folder / "cards" / "bench.md").write_text(
        f"---\nversion: 1\nnoun: bird\nkind: species\nsource: {{kind: folder, path: {path}}}\n"
        f"classes:\n{names}---\n"
    )


def rows_of(images: int, classes: int = BASE) -> list[dict[str, Any]]:
    """Image ids and labels of the first `classes` classes, by ascending id, as stages take them."""
    names = card().classes
    labels = [number * 7 % classes for number in range(images)]
    rows = [
        {"image_id": f"bench/{names[label]}/{number:07d}.jpg", "label": label}
        for number, label in enumerate(labels)
    ]
    return sorted(rows, key=lambda row: row["image_id"])


def write_photographs(folder: Path, count: int, width: int = 64, height: int = 48) -> None:
    """`count` small JPEGs in class folders, no two alike, and a shuffled list of them."""
    rng = np.random.default_rng(SEED)
    names, listed = card().classes, []
    for name in names:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        name = names[number % len(names)]
        path = f"{name}/{number:07d}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / path, quality=85)
        listed.append(f"{path},{name}\n")
    random.Random(SEED).shuffle(listed)
    (folder / "list.csv").write_text("path,class\n" + "".join(listed))


def write_images(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A Download artifact of tiny pictures, no two alike by their fingerprints."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    schema = schemas.images(card().classes)
    for index, part in enumerate(shards.chunks(list(enumerate(rows)), 1000)):
        images = [
            {
                **row,
                "image": {"bytes": buffer.getvalue() + number.to_bytes(4, "big"), "path": None},
                "sha256": f"{number:064x}",
                "pixels": f"{number:032x}",
                "dhash": number,
                "width": 4,
                "height": 4,
                "official_split": "",
            }
            for number, row in part
        ]
        shards.write(shards.shard_path(folder, "images", index), images, schema)


def write_split(folder: Path, rows: Sequence[dict[str, Any]], split: str = "train") -> None:
    """A Split artifact in which all images are in one split."""
    folder.mkdir(parents=True)
    names = card().classes
    columns = {
        "image_id": [row["image_id"] for row in rows],
        "label": [row["label"] for row in rows],
        "class_name": [names[row["label"]] for row in rows],
        "group": [schemas.GROUPS[row["label"] >= BASE] for row in rows],
        "split": [split] * len(rows),
    }
    shards.write(folder / "split.parquet", pa.table(columns), schemas.split(names))


class LatentEngine:
    """An engine without a model that takes LATENCY a shard and looks at every image.

    Half of its answers name the truth, which it knows from the image's id, the others a neighbour.
    """

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        time.sleep(LATENCY)
        return [self._answers(request, sampling.n) for request in requests]

    def _answers(self, request: Request, n: int) -> list[Completion]:
        assert request.picture.size[0] > 0
        _, truth, file = request.key.split("/")
        names = card().classes
        number = int(file.partition(".")[0])
        wrong = names[(names.index(truth) + 1 + number % 5) % BASE]
        said = [truth if (number + sample) % 2 else wrong for sample in range(n)]
        texts = (f"<think>{file} {k}</think><answer>{name}</answer>" for k, name in enumerate(said))
        return [Completion(text, "stop", 30, -0.5) for text in texts]


def engine(policy: Path, settings: Any) -> LatentEngine:
    """`[engine] backend = tests.bench.synthetic:engine`."""
    return LatentEngine()


def write_predictions(
    folder: Path, rows: Sequence[dict[str, Any]], modes: Sequence[str], better: int
) -> None:
    """An Evaluate artifact's predictions: of ten images, 5 + `better` are right in each mode."""
    folder.mkdir(parents=True)
    names = card().classes
    with shards.Writer(folder / "predictions.parquet", schemas.predictions(names)) as writer:
        for mode in modes:
            for part in shards.chunks(list(enumerate(rows)), 10_000):
                writer.add_table([_prediction(number, row, mode, better) for number, row in part])


def _prediction(number: int, row: dict[str, Any], mode: str, better: int) -> dict[str, Any]:
    names = card().classes
    correct = number % 10 < 5 + better
    said = row["label"] if correct else (row["label"] + 1 + number % 5) % len(names)
    return {
        **row,
        "group": schemas.GROUPS[row["label"] >= BASE],
        "mode": mode,
        "options": [],
        "completion": f"<think>{number}</think><answer>{names[said]}</answer>",
        "answer": names[said],
        "class_id": said,
        "correct": correct,
        "status": "exact",
        "letter": "",
        "truth_letter": "",
        "vote_share": 0.75 if mode == "majority" else None,
    }


def write_rollouts(
    folder: Path, images: int, per_image: int, per_shard: int = IMAGES_PER_SHARD
) -> None:
    """Rollout shards of `per_shard` images, in the order of the split."""
    folder.mkdir(parents=True)
    for index, part in enumerate(shards.chunks(rows_of(images), per_shard)):
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
