"""Supervised fine-tuning: it makes the base policy of the embedded dataset, and is a baseline.

`base_policy` teaches the policy that everything starts from on the images set aside for pretraining
(base and novel classes alike, as a real vision-language model has seen birds of all kinds). That is
the embedded policy, an untrained one of its size (`tiny`), a folder, or a model of the hub;
`adopt.py` takes over one that is taught nothing.

    python -m training.sft CONFIG.json

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

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
CHECKPOINTS = 10  # in all, so that a kill costs a tenth


def base_policy(
    output: Path,
    *,
    model: str,
    download: list[Path],
    split: list[Path],
    card: str,
    seed: int,
    prompt_style: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    muon_learning_rate: float,
    question_share: float,
    blind_share: float,
    min_pixels: int,
    max_pixels: int,
    dtype: str,
) -> None:
    """Write the base policy into the folder `output`.

    A share `question_share` of the examples are multiple-choice questions, `blind_share` of those
    with a grey image.

    `model` is `embedded`, `tiny`, a model id of the hub, or a folder. `card` is one card's name, or several
    joined by +, each with a folder in `download` and in `split`; only rows whose split is
    `pretrain` are read. `min_pixels` and `max_pixels` bound the
    area an image is scaled to. `dtype` is the precision of the saved weights.
    """
    disable_progress_bar()  # of the library: one bar a stage is enough
    if steps:
        check_gpu()
    cards = [data_cards.load(name) for name in card.split("+")]
    pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    texts = [text for each in cards for text in (each.kind, each.noun, *each.classes)]
    if model == "tiny":
        policy, processor = tiny_policy.build(tiny_policy.slot_words(texts), seed=seed, **pixels)
    elif model == "embedded":
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
    if steps:
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
        batches = _random_batches(
            rows, Decoder(processor), names, wording, seed, batch_size, question_share, blind_share
        )
        figures = train_supervised(
            policy,
            processor,
            batches,
            steps=steps,
            learning_rate=learning_rate,
            muon_learning_rate=muon_learning_rate,
            checkpoint=sft_checkpoint.place(output),
        )
        print(f"base_policy: loss {figures['final_loss']:.3f} after {steps} supervised steps")
    policy.to(getattr(torch, dtype))
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
            parts = [collate(processor, part).to(device) for part in _of_alike_lengths(batch)]
            taught = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
            mean_loss = 0.0
            for part in parts:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = model(**part, num_items_in_batch=taught).loss
                loss.backward()
                mean_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()
            recent = [*recent[-9:], mean_loss]
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
    stop = processor.tokenizer.eos_token
    ends = [example.completion + ("" if example.unfinished else stop) for example in batch]
    inputs = processor(
        text=[prompt + end for prompt, end in zip(prompt_texts, ends, strict=True)],
        images=[[example.image] for example in batch],
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (end, example) in enumerate(zip(ends, batch, strict=True)):
        learned = _num_tokens(processor, end) - _num_tokens(processor, example.given)
        labels[row, -learned:] = inputs["input_ids"][row, -learned:]
    inputs["labels"] = labels
    return inputs


def _of_alike_lengths(batch: list[sft_examples.Example]) -> list[list[sft_examples.Example]]:
    """The short and the long examples of a batch, so that few are padded to the longest."""
    lengths = [len(example.question) + len(example.completion) for example in batch]
    middle = (min(lengths) + max(lengths)) / 2
    pairs = list(zip(batch, lengths, strict=True))
    short = [example for example, length in pairs if length <= middle]
    long = [example for example, length in pairs if length > middle]
    return [part for part in (short, long) if part]


def _num_tokens(processor: Any, text: str) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0


def pretrain_images(download: Path, split: Path) -> list[tuple[str, str, bytes]]:
    """(card, class name, encoded image) of every image set aside for pretraining."""
    rows = shards.read(split, "split", ["image_id", "class_name", "split"]).to_pylist()
    wanted = {row["image_id"]: row["class_name"] for row in rows if row["split"] == "pretrain"}
    return [
        (row["image_id"].split("/", 1)[0], wanted[row["image_id"]], row["image"]["bytes"])
        for row in shards.iter_rows(download, "images", ["image_id", "image"])
        if row["image_id"] in wanted
    ]


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
    batch_size: int,
    question_share: float,
    blind_share: float,
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
                    question_share=question_share,
                    blind_share=blind_share,
                )
            )
            if len(batch) == batch_size:
                yield batch
                batch = []


if __name__ == "__main__":
    main(base_policy)
