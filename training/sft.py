"""Supervised fine-tuning: it makes the base policy of the embedded dataset, and is a baseline.

`base_policy` teaches the policy that everything starts from on the images set aside for pretraining
(base and novel classes alike, as a real vision-language model has seen birds of all kinds). That is
the embedded policy, an untrained one of its size (`tiny`), a folder, or a model of the hub;
`adopt.py` takes over one that is taught nothing.

    python -m training.sft recipe.json

Stopped or killed, it goes on from its last checkpoint with the very same result.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

import data_cards
from tasks.runtime import waiting
from tasks.runtime.command import main
from tasks.runtime.errors import StageError, first_line
from tasks.runtime.machine import check_gpu, gpus
from tasks.tables import shards
from tasks.tables.pixels import Decoder, picture_size
from training.data import sft_examples
from training.data.refused import left_out
from training.loop import sft_checkpoint
from training.loop.supervised import train_supervised
from training.model import tiny_policy
from training.model.processors import check, sized_processor
from training.settings import EMBEDDED, BasePolicySettings


def base_policy(
    output: Path,
    *,
    card: str,
    download: list[Path],
    split: list[Path],
    prompt_style: str,
    seed: int,
    settings: BasePolicySettings,
) -> None:
    """Write the base policy into the folder `output`.

    `card` is one card's name, or several joined by +, each with a folder in `download` and in
    `split`; only rows whose split is `pretrain` are read.
    """
    disable_progress_bar()  # of the library: one bar a stage is enough
    model = settings.model
    if settings.steps:
        check_gpu()
    cards = [data_cards.load(name) for name in card.split("+")]
    pixels = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    texts = [text for each in cards for text in (each.kind, each.noun, *each.classes)]
    if model == "tiny":
        policy, processor = tiny_policy.build(tiny_policy.slot_words(texts), seed=seed, **pixels)
    elif model == EMBEDDED:
        policy, processor = tiny_policy.embedded(tiny_policy.slot_words(texts), **pixels)
    else:
        try:
            processor = sized_processor(model, **pixels)
            with waiting.loading(f"base_policy: loading {waiting.weights(model)}"):
                policy = AutoModelForImageTextToText.from_pretrained(
                    model, use_safetensors=True, dtype=torch.float32
                )
        except (OSError, ValueError) as error:
            raise StageError(
                f"[BasePolicy] model = {model} cannot be loaded: {first_line(error)}"
            ) from error
    check(processor, cards, prompt_style)
    if settings.steps:
        if gpus():  # the first of them: one process teaches
            policy.to("cuda")
        wording = {each.name: _wording(each, prompt_style) for each in cards}
        names = {each.name: each.classes for each in cards}
        rows = [
            row for places in zip(download, split, strict=True) for row in pretrain_images(*places)
        ]
        if not rows:
            raise StageError(
                "no image is set aside for pretraining; give [Split] a pretrain_share, or set "
                "[BasePolicy] steps = 0"
            )
        decode, refused = Decoder(processor), {}
        for image_id, *_, data in rows:
            if reason := decode.refusal(*picture_size(data)):
                refused[image_id] = reason
        left_out(refused, len(rows), "images", "base_policy")
        rows = [row for row in rows if row[0] not in refused]
        batches = _random_batches(rows, decode, names, wording, seed, settings)
        figures = train_supervised(
            policy,
            processor,
            batches,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            muon_learning_rate=settings.muon_learning_rate,
            checkpoint=sft_checkpoint.place(output),
        )
        loss, steps = figures["final_loss"], settings.steps
        print(f"base_policy: loss {loss:.3f} after {steps} supervised steps")
    policy.to(getattr(torch, settings.dtype))
    tiny_policy.save(policy, processor, output)


def pretrain_images(download: Path, split: Path) -> list[tuple[str, str, bytes]]:
    """(image id, class name, encoded image) of every image set aside for pretraining."""
    rows = shards.read(split, "split", ["image_id", "class_name", "split"]).to_pylist()
    wanted = {row["image_id"]: row["class_name"] for row in rows if row["split"] == "pretrain"}
    return [
        (row["image_id"], wanted[row["image_id"]], row["image"]["bytes"])
        for row in shards.iter_rows(download, "images", ["image_id", "image"])
        if row["image_id"] in wanted
    ]


def _wording(card: data_cards.Card, style: str) -> sft_examples.Wording:
    return sft_examples.Wording(card.noun, card.kind, style)


def _random_batches(
    rows: list[tuple[str, str, bytes]],
    decode: Decoder,
    names: dict[str, tuple[str, ...]],
    wording: dict[str, sft_examples.Wording],
    seed: int,
    settings: BasePolicySettings,
) -> Iterator[list[sft_examples.Example]]:
    """Endless batches that go through all images, in a new order each time round."""
    rng = random.Random(f"sft {seed}")
    batch: list[sft_examples.Example] = []
    while True:
        for image_id, name, data in rng.sample(rows, len(rows)):
            card = image_id.split("/", 1)[0]
            batch.append(
                sft_examples.random_example(
                    decode(data),
                    name,
                    names[card],
                    rng,
                    wording[card],
                    question_share=settings.question_share,
                    blind_share=settings.blind_share,
                )
            )
            if len(batch) == settings.batch_size:
                yield batch
                batch = []


if __name__ == "__main__":
    main(base_policy)
