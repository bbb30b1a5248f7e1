"""Supervised training on examples made one batch at a time.

The loss is the cross-entropy of the completion's tokens that are taught; prompt and image tokens carry
none. Stopped or killed, it goes on from its last checkpoint with the very same result.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.language import prompts
from tasks.runtime.interrupts import shard_by_shard, stop_asked, stop_if_asked
from tasks.runtime.progress import progress
from training.data import sft_examples
from training.loop import sft_checkpoint

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
CHECKPOINTS = 10  # in all, so that a kill costs a tenth


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
    stop, opening = processor.tokenizer.eos_token, prompts.opening(processor)
    ends = [
        example.completion.removeprefix(opening) + ("" if example.unfinished else stop)
        for example in batch
    ]
    inputs = processor(
        text=[prompt + end for prompt, end in zip(prompt_texts, ends, strict=True)],
        images=[[example.image] for example in batch],
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (end, example) in enumerate(zip(ends, batch, strict=True)):
        learned = _num_tokens(processor, end) - _num_tokens(
            processor, example.given.removeprefix(opening)
        )
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
