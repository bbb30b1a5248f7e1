"""Tries a run's largest batch before its first step, to see whether memory suffices.

Completions grow while a policy learns to reason, so memory may run out after hours. On request the
trainer's own code trains on the longest prompt with completions of the full length. The gradients of
another turn and the optimizer's states are in memory meanwhile. Then everything is restored.
"""

import copy
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from tasks.runtime.errors import StageError
from tasks.runtime.memory import own_peak
from training.model import sharding
from training.resources.asked import optimizer_bytes
from training.resources.gpu_memory import GIB
from training.shared_prefix import packing
from training.shared_prefix.check import out_of_memory

# Attributes that a turn changes in place, so that they are copied. The others are restored as they are.
CHANGED = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "state", "counters")
Row = dict[str, Any]


def try_largest(trainer: Any, row: Row, prompt: int) -> None:
    """Train on the largest batch of a run and print its time and memory; every process must call it.

    `row` (`prompt` and `image`) is the longest question, of `prompt` tokens. The trainer, its weights
    and all random generators stay as they were. Raises StageError when memory runs out.
    """
    if trainer.is_deepspeed_enabled:
        if trainer.accelerator.is_main_process:
            print("train: the largest batch is not tried: DeepSpeed would take a step", flush=True)
        return
    length = fullest(trainer, prompt)
    rows = trainer.args.per_device_train_batch_size
    what = f"{rows} completions of {length:,} tokens after a prompt of {prompt:,}"
    model, on_gpu = trainer.model_wrapped, trainer.accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        with _as_it_was(trainer), _generators(), _states(trainer):
            _prepare(trainer, row, length)
            batch = _batch(trainer, row)
            turns = min(2, trainer.args.gradient_accumulation_steps)
            for turn in range(turns):  # in the second turn, the first one's gradients are in memory
                last = turn == turns - 1
                with nullcontext() if last else sharding.unreduced(trainer, model):
                    trainer.training_step(model, batch, None)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise StageError(
            f"there is not enough memory for the largest batch of this run, {what}; what helps: a "
            "smaller [Train] micro_batch_size, tokens_per_micro_batch, gradient_checkpointing in trl, "
            "or LoRA (lora_rank)"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else own_peak() / 1024
    if on_gpu:
        torch.cuda.empty_cache()
    if trainer.accelerator.is_main_process:
        print(
            f"train: the largest batch, {what}, took {seconds:.1f} s and {peak:.2f} GiB at its peak",
            flush=True,
        )


def fullest(trainer: Any, prompt: int) -> int:
    """The completion length in tokens at which a micro-batch needs the most memory.

    That is the full length, unless shorter completions fill the bound on tokens better. Without a
    shared prefix, the logits of every completion token need more memory than the rest.
    """
    longest: int = trainer.max_completion_length
    limit = getattr(trainer, "tokens_per_micro_batch", 0)
    if not limit:
        return longest
    rows = range(trainer.args.per_device_train_batch_size)
    groups = [row // trainer.num_generations for row in rows]
    shared = trainer.way == "prefix"

    def most(length: int) -> int:
        prompts, completions = [prompt] * len(rows), [length] * len(rows)
        batches = packing.split(groups, rows, prompts, completions, limit, shared=shared)
        return max(
            len(batch) * length + shared * prompt * len({groups[row] for row in batch})
            for batch in batches
        )

    return max(range(longest, 0, -1), key=most)


def _prepare(trainer: Any, row: Row, length: int) -> None:
    """Replace the trainer's generation and rewards, and switch off the parity check.

    Completions have `length` tokens, and every other one earns a reward.
    """
    text = row["prompt"][-1]["content"]
    ids = trainer._tokenizer(text, add_special_tokens=False)["input_ids"]
    completion = [ids[place % len(ids)] for place in range(length - 1)] + [trainer.eos_token_ids[0]]

    def generate(prompt_ids: list, *_: Any, **__: Any) -> tuple:
        logps = [[0.0] * length for _ in prompt_ids] if trainer.use_vllm else None
        return [list(completion) for _ in prompt_ids], logps

    def pay(inputs: list[Row], *_: Any) -> torch.Tensor:
        count = len(inputs) * trainer.accelerator.num_processes
        paid = torch.arange(count, device=trainer.accelerator.device) % 2
        return paid.float()[:, None].expand(-1, len(trainer.reward_funcs)).clone()

    trainer._generate_single_turn, trainer._calculate_rewards = generate, pay
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._step, trainer._buffered_inputs = 0, None
    trainer._unchecked, trainer.attempts = False, 0


def _batch(trainer: Any, row: Row) -> list[Row]:
    """A process's rows of a generation batch: one question, with a different image for each group."""
    args, size = trainer.args, row["image"].size
    count = args.per_device_train_batch_size * args.steps_per_generation
    first = trainer.accelerator.process_index * count
    groups = [(first + place) // trainer.num_generations for place in range(count)]
    images = {group: _noise(size, group) for group in groups}
    return [{**row, "image": images[group]} for group in groups]


def _noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of noise; each seed's is different, since equal images are encoded once."""
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


@contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """Restore the trainer's attributes at the end, and report nothing meanwhile."""
    kept, reports = dict(vars(trainer)), trainer.args.report_to
    for name in CHANGED:
        if name in kept:
            setattr(trainer, name, copy.deepcopy(kept[name]))
    trainer.args.report_to = []
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(kept)
        trainer.args.report_to = reports


@contextmanager
def _generators() -> Iterator[None]:
    """Restore the states of all random generators at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(
            [torch.cuda.current_device()] if torch.cuda.is_available() else []
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _states(trainer: Any) -> Iterator[None]:
    """Within this, allocate as much memory as the optimizer's states will need, unless they exist."""
    size = 0.0
    if not trainer.optimizer.state:
        each = optimizer_bytes(str(getattr(trainer.args.optim, "value", trainer.args.optim)))
        for weight in trainer.model_wrapped.parameters():
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            if own.requires_grad and own.device.type == trainer.accelerator.device.type:
                size += own.numel() * each
    held = torch.empty(int(size), dtype=torch.uint8, device=trainer.accelerator.device)
    try:
        yield
    finally:
        del held
