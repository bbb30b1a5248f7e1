"""Estimates the GPU memory of a training from the model's config, before a weight is loaded.

Weights, gradients, optimizer states and the reference model are counted exactly. The temporary memory
of a step (copies of weights, activations, the key-value cache of generation) is estimated for the
longest prompt, from the tensors that a forward and backward pass keeps; `tests/bench/memory.py`
compares the estimate with a real step. `check` refuses a run that cannot fit, and suggests remedies
for one that may not fit. `training.resources.vllm_memory` estimates a colocated vLLM.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tasks.engines.shared_prompts.cache import room_for
from tasks.language import prompts
from tasks.runtime import memory
from tasks.runtime.errors import StageError
from training.resources.asked import Asked
from training.resources.main_memory import print_line
from training.resources.sizes import Sizes, Tower, sizes_of

GIB = 1 << 30
QUANTISED = 0.57  # bytes of an NF4 weight, scales included (Dettmers et al. 2023, section 3)
# Bytes of a process by itself. On a GPU: the driver's context, loaded kernels, and workspaces of cuBLAS
# and NCCL. On a CPU: Python with its libraries.
PROCESS = 1.0 * GIB
# Numbers that a layer keeps of each token for the backward pass (KEPT), and that its backward pass
# needs for a moment (PASSING), as multiples of the layer's widths (hidden, inner).
KEPT, PASSING = (14, 4), (8, 3)
READING = (6, 3)  # the same for a pass without a backward one, which reads prompts
# TILE: tokens and words of a tile of TRL's fused head (trl.kernels.chunked_logprob). Triton reduces a
# tile in place; without it there are BESIDE further float32 tiles.
TILE, BESIDE = (4096, 32768), 8
# Bytes for each row and word of the vocabulary while a token is drawn: the logits of this token and of
# the next, probabilities, and their sums in float64 (tasks.engines.shared_prompts.generation.Sampler).
DRAWING = 24
# The parity check compares so many rows of so many groups (training.shared_prefix.check).
COMPARED = (2, 2)
# Weights that ZeRO-3 has gathered or is gathering: its stage3_max_live_parameters, twice.
LIVE = 2e9
# Measured factor of reserved over allocated memory (tests/bench/memory.py).
SLACK = 1.25


@dataclass(frozen=True)
class Estimate:
    """The bytes that a process needs, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    copies: float  # of weights, while a pass lasts: rounded by autocast, or gathered from shards
    activations: float
    generation: float
    process: float

    @property
    def certain(self) -> float:
        """Bytes that are needed whatever the lengths of prompts and completions."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.copies

    @property
    def total(self) -> float:
        """The most bytes at any time: activations and the cache of generation are never there together."""
        return self.certain + max(self.activations, self.generation) + self.process

    def described(self) -> str:
        """The sum and the parts in GiB, as one line."""
        listed = [f"{name} {size / GIB:.2f}" for name, size in asdict(self).items() if size]
        return f"{self.total / GIB:.2f} GiB ({', '.join(listed)})"


def of_gpu(asked: Asked) -> Estimate:
    """The memory that one process of the trainer needs on its GPU, or on a machine without one.

    Raises StageError where the policy's config is not known.
    """
    settings, options, place = asked.settings, asked.options, asked.place
    sizes, size, trained = sizes_of(asked.policy), asked.size, asked.trained
    prompt_tokens, image_tokens = asked.prompt
    completion_tokens = asked.completion_tokens
    checkpointing, turns, shards = options.gradient_checkpointing, asked.passes, place.shards
    sequences, shared, lora = settings.micro_batch_size, asked.shared, settings.lora_rank > 0
    group = asked.group if settings.shared_prefix else 1
    deepspeed = shards > 1 and place.sharding == "deepspeed"
    # Full fine-tuning keeps weights, gradients and states in float32, whatever the precision of
    # computation. DeepSpeed keeps rounded weights, and float32 ones beside the optimizer's states.
    held = size if lora or deepspeed else 4
    masters = 4 if deepspeed and size < 4 else 0
    weights = sizes.count * (QUANTISED if settings.quantized else held) + 4 * trained * lora
    states = trained * (masters + asked.optimizer_bytes)
    # Gradients of the output layer and of the embedding are temporary tensors of their full size
    # before they are accumulated. If the two are tied, the first is there until the second is computed.
    trains_words = not lora and "language" not in settings.frozen
    words = 4 * sizes.vocabulary * sizes.language.hidden * trains_words
    sees = (
        checkpointing or "vision" in settings.adapted if lora else "vision" not in settings.frozen
    )
    passes = _Passes(sizes, size, held, checkpointing, place.cuda, sees=bool(trained) and sees)
    one = prompt_tokens + completion_tokens
    groups = -(-sequences // group) if shared else sequences
    tokens = groups * prompt_tokens + sequences * completion_tokens
    if asked.pass_limit:
        tokens = min(tokens, max(asked.pass_limit, one))
    taken = [(tokens, min(sequences, -(-tokens // one) * group) * completion_tokens, groups)]
    if shared:
        rows = min(sequences, COMPARED[0] * min(COMPARED[1], group))
        taken.append((rows * one, rows * completion_tokens, rows))
    reference = options.beta != 0.0 and not asked.supervised
    return Estimate(
        weights=weights / shards,
        gradients=trained * (held if deepspeed else 4) / shards,
        optimizer=0.0 if place.offloaded else states / shards,
        reference=sizes.count * size / shards if reference and not lora else 0.0,
        copies=_copies(sizes, size, held, trained, shards, deepspeed) * (shards > 1 or turns > 1),
        activations=max(
            SLACK * max(passes.bytes(t, s, i * image_tokens) for t, s, i in taken)
            + words * (turns > 1),
            words * (sizes.tied + (turns > 1)),
        ),
        generation=_generation(asked, sizes, size if shards > 1 else held)
        + (sizes.count * size if deepspeed and asked.generated else 0.0),
        process=PROCESS,
    )  # fmt: skip


@dataclass(frozen=True)
class _Passes:
    """The memory of a forward and backward pass: tensors kept for the backward pass, and temporary ones."""

    sizes: Sizes
    size: int  # bytes of a number in the precision of computation
    held: int  # bytes of a weight, and of a hidden state between layers
    checkpointing: bool
    cuda: bool
    sees: bool  # whether gradients go through the vision tower

    def bytes(self, tokens: int, scored: int, image_tokens: int) -> float:
        """Bytes of a pass over `tokens`, of which the head scores `scored` on a GPU, and all on a CPU."""
        patches = image_tokens * self.sizes.merged
        language = self._kept(self.sizes.language, tokens)
        vision = self._kept(self.sizes.vision, patches) if self.sees else 0.0
        moments = (
            self._head(scored if self.cuda else tokens),
            self._passing(self.sizes.language, tokens),
            self._passing(self.sizes.vision, patches) - (language if self.sees else 0.0),
        )
        return language + vision + max(moments)

    def _kept(self, tower: Tower, tokens: int) -> float:
        if self.checkpointing:
            return float(tokens) * tower.layers * tower.hidden * self.held
        return float(tokens) * tower.layers * self.size * _layer(tower, KEPT)

    def _passing(self, tower: Tower, tokens: int) -> float:
        numbers = _layer(tower, PASSING) + (_layer(tower, KEPT) if self.checkpointing else 0)
        return float(tokens) * self.size * numbers

    def _head(self, scored: int) -> float:
        """Bytes of the fused head: a tile of logits, its weights, hidden states and their gradients."""
        words = min(self.sizes.vocabulary, TILE[1])
        hidden = self.sizes.language.hidden
        tile = min(scored, TILE[0]) * words * (self.size + (0 if self.cuda else 4 * BESIDE))
        cast = words * hidden * (self.size + (0 if self.cuda else 4))
        return float(tile + cast + scored * hidden * (4 + self.size))


def _layer(tower: Tower, times: tuple[int, int]) -> int:
    return times[0] * tower.hidden + times[1] * tower.inner


def _copies(
    sizes: Sizes, size: int, held: int, trained: int, shards: int, deepspeed: bool
) -> float:
    """Bytes of temporary weights in a pass: autocast's copies, or those gathered from shards."""
    head = sizes.vocabulary * sizes.language.hidden
    if deepspeed:
        return min(float(sizes.count), LIVE) * size
    if shards > 1:  # two layers, in the precision of the pass, and the head as it is held
        layer = sizes.parameters["language"] / max(1, sizes.language.layers)
        return 2 * layer * size + head * held
    return float(trained * size) if held > size else 0.0


def _generation(asked: Asked, sizes: Sizes, cached: int) -> float:
    """The most bytes of a batch that the trainer's model generates: while prompts are read, or at the end.

    At the end there are all keys and values, one layer of those that grow twice, and the logits. Prompts
    have one copy of theirs, or where completions do not branch off, one for each completion. A key or value
    has `cached` bytes: keys are rotated in the precision of hidden states, and the cache takes theirs.
    """
    (prompt, image), token = asked.prompt, sizes.cache * cached
    most = 0.0
    for questions, rows in asked.generated:
        copies, room = rows, asked.settings.max_completion_length
        if asked.branches:
            copies, room = questions, room_for(room - 1)
        read, written = copies * prompt * token, rows * room * token
        grown = (written if asked.branches else read + written) / max(1, sizes.language.layers)
        passing = max(
            copies * prompt * _layer(sizes.language, READING),
            copies * image * sizes.merged * _layer(sizes.vision, READING),
        )
        drawing = DRAWING * rows * sizes.vocabulary
        most = max(most, read + passing * asked.size, read + written + grown + drawing)
    return most


def check(
    needed: Estimate,
    available: float,
    vllm: float = 0.0,
    vllm_sleeps: bool = False,
    say: Callable[[str], None] = print_line,
) -> None:
    """`say` how much memory training needs of the `available` bytes, and what helps if it is tight.

    A colocated vLLM takes `vllm` bytes; if `vllm_sleeps` it frees them while weights are updated.
    Raises StageError when the certain part of the estimate does not fit.
    """
    room = available - (0.0 if vllm_sleeps else vllm)
    beside = f" beside vLLM's {vllm / GIB:.2f}" if vllm else ""
    say(f"about {needed.described()} of {room / GIB:.2f} GiB{beside}")
    helps = (
        "LoRA ([Train] lora_rank), a smaller micro_batch_size, gradient_checkpointing in trl, "
        "dtype = bfloat16, or more processes that share the weights (training/recipes)"
    )
    if vllm and not vllm_sleeps:
        helps += ', or vLLM asleep during updates ("vllm_enable_sleep_mode": true in trl)'
    awake = needed.weights + needed.optimizer + needed.reference
    for least, place in ((needed.certain, room), (awake, available - vllm)):
        if least > place:
            raise StageError(
                f"training needs at least {least / GIB:.2f} GiB a process and there are "
                f"{place / GIB:.2f} GiB{beside}; what helps: {helps}; [Train] check_memory = false "
                "tries anyway"
            )
    if needed.total > 0.9 * room:
        say(f"that may be too much; what helps: {helps}")


def available_memory() -> float:
    """Bytes that a process may use: free on its GPU, else its share of the machine's free memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return memory.available() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + PROCESS


def total_memory() -> float:
    """All bytes of this process's GPU, free or not."""
    return float(torch.cuda.mem_get_info()[1])


def longest_prompt(processor: Any, rows: list[dict[str, Any]]) -> int:
    """Tokens of the longest prompt, image included."""
    return size_of_prompts(processor, rows)[0]


def size_of_prompts(processor: Any, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Tokens of the longest prompt, and the most image tokens of any prompt."""
    texts = [prompts.rendered(processor, prompts.chat(row["prompt"][0]["content"])) for row in rows]
    images = [[row["image"]] for row in rows]
    ids = processor(text=texts, images=images, padding=True, return_tensors="pt")["input_ids"]
    token = getattr(processor, "image_token_id", None)
    of_image = int((ids == token).sum(1).max()) if token is not None else 0
    return int(ids.shape[1]), of_image
