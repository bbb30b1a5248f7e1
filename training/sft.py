"""Supervised fine-tuning: it makes the base policy of the embedded dataset, and is a baseline.

`base_policy` resolves the policy that everything starts from. For `tiny` that is an
untrained model of under two million parameters, taught on the images set aside for pretraining
(base and novel classes alike, as a real vision-language model has seen birds of all kinds). For
anything else it is a model of the hub or a folder; `adopt.py` takes over one that is taught nothing.

    python -m training.sft recipe.json

The loss is the cross-entropy of the completion's tokens; prompt and image tokens carry none.
Stopped or killed, it goes on from its last checkpoint with the very same result.
"""

import itertools
import math
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import data_cards
from tasks.language import prompts
from tasks.runtime import waiting
from tasks.runtime.command import main
from tasks.runtime.errors import StageError, first_line
from tasks.runtime.interrupts import shard_by_shard, stop_asked, stop_if_asked
from tasks.runtime.machine import check_gpu, gpus
from tasks.runtime.progress import progress
from tasks.tables import shards
from tasks.tables.pixels import Decoder
from training.data import sft_examples
from training.loop import sft_checkpoint
from training.model import tiny_policy
from training.model.processors import sized_processor
from training.settings import BasePolicySettings

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
CHECKPOINTS = 10  # in all, so that a kill costs a tenth


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
    if model == "tiny":
        texts = [text for each in cards for text in (each.kind, each.noun, *each.classes)]
        policy, processor = tiny_policy.build(tiny_policy.slot_words(texts), seed=seed, **pixels)
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
    if settings.steps:
        if gpus():  # the first of them: one process teaches
            policy.to("cuda")
        wording = {each.name: _wording(each, prompt_style) for each in cards}
        names = {each.name: each.classes for each in cards}
        rows = [
            row for places in zip(download, split, strict=True) for row in pretrain_images(*places)
        ]
        batches = _random_batches(rows, Decoder(processor), names, wording, seed, settings)
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


def train_supervised(
    model: PreTrainedModel,
    processor: Any,
    batches: Iterator[list[sft_examples.Example]],
    *,
    steps: int,
    learning_rate: float,
    muon_learning_rate: float = 0.0,
    weight_decay: float = 0.01,
    bf16: bool = True,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """Teach `model` in place, one batch a step; returns the steps and the mean loss at the end.

    Linear warm-up and linear decay. AdamW at `learning_rate`; with a `muon_learning_rate` the
    weight matrices inside the network are left to Muon. `bf16` computes under autocast; weights keep their
    precision. Progress goes to the terminal: rate, time left, loss.

    `checkpoint` is a file to go on from, where it is there, and written every tenth of the steps and
    when the run is asked to stop, which raises Stopped. `batches` always start at the first one.
    """
    device = next(model.parameters()).device
    optimizers = _optimizers(model, learning_rate, muon_learning_rate, weight_decay)
    warmup = max(1, round(WARMUP_SHARE * steps))

    def scale(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, scale) for each in optimizers]
    model.train()
    state = sft_checkpoint.State(model, optimizers, schedules)
    first, recent = state.load(checkpoint) if checkpoint else (0, [])
    every = math.ceil(steps / CHECKPOINTS)
    deque(itertools.islice(batches, first), maxlen=0)  # drawn again, so that the next is the same
    with (
        shard_by_shard("step"),
        progress(None, desc="supervised", total=steps, unit="steps", done=first) as bar,
    ):
        for step, batch in zip(range(first, steps), batches, strict=False):
            inputs = collate(processor, batch).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
            recent = [*recent[-9:], loss.item()]
            bar.update()
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
            if checkpoint and (stop_asked() or (step + 1) % every == 0):
                state.save(checkpoint, step + 1, recent)
            stop_if_asked()
    model.eval()
    return {"steps": float(steps), "final_loss": sum(recent) / max(1, len(recent))}


def collate(processor: Any, batch: list[sft_examples.Example]) -> Any:
    """Model inputs of a batch, padded on the left, with `labels` for the completions' tokens."""
    prompt_texts = [
        prompts.rendered(processor, prompts.chat(example.question)) for example in batch
    ]
    ends = [example.completion + processor.tokenizer.eos_token for example in batch]
    inputs = processor(
        text=[prompt + end for prompt, end in zip(prompt_texts, ends, strict=True)],
        images=[[example.image] for example in batch],
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, end in enumerate(ends):
        length = len(processor.tokenizer(end, add_special_tokens=False)["input_ids"])
        labels[row, -length:] = inputs["input_ids"][row, -length:]
    inputs["labels"] = labels
    return inputs


def pretrain_images(download: Path, split: Path) -> list[tuple[str, str, bytes]]:
    """(card, class name, encoded image) of every image set aside for pretraining."""
    rows = shards.read(split, "split", ["image_id", "class_name", "split"]).to_pylist()
    wanted = {row["image_id"]: row["class_name"] for row in rows if row["split"] == "pretrain"}
    found = [
        (row["image_id"].split("/", 1)[0], wanted[row["image_id"]], row["image"]["bytes"])
        for row in shards.iter_rows(download, "images", ["image_id", "image"])
        if row["image_id"] in wanted
    ]
    if not found:
        raise StageError(
            f"{split} sets no image aside for pretraining; give the split a pretrain share, or set "
            "[BasePolicy] steps = 0"
        )
    return found


def _optimizers(
    model: PreTrainedModel, learning_rate: float, muon_learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Muon makes every update of a matrix orthogonal, so that all its directions are learned at one
    pace (https://kellerjordan.github.io/posts/muon/). Copying a name from the prompt needs just
    that; with AdamW the tiny policy was far from it after many times the steps. Embeddings, norms,
    biases and the patch convolution stay with AdamW, as Muon's author advises.
    """
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
    chosen = {id(p) for p in matrices} if muon_learning_rate else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    if not chosen:
        return [adamw]
    return [torch.optim.Muon(matrices, lr=muon_learning_rate, weight_decay=weight_decay), adamw]


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
        for card, name, data in rng.sample(rows, len(rows)):
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
