"""Estimates whether a colocated vLLM fits into its share of the GPU, before anything is loaded.

vLLM takes its share of the GPU's whole memory, whatever else is there. It holds its own copy of all
weights, activations and graphs; the rest is its key-value cache. It does not start if the cache cannot
hold one sequence of `vllm_max_model_length`. The cache holds a prompt once for all of its completions,
but for the last block (prefix caching, vLLM's default).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from training.resources.main_memory import print_line
from training.resources.sizes import sizes_of

GIB = 1 << 30
ENGINE, GRAPHS = 1.0 * GIB, 0.5 * GIB  # the least for itself; CUDA graphs
BATCH = 4096  # tokens in a batch: what TRL sets for a colocated engine
KEY = "vllm_gpu_memory_utilization"
BLOCK = 16  # positions in a block of vLLM's cache


@dataclass(frozen=True)
class VllmNeeds:
    """Bytes of an engine on one GPU: weights, the engine, the cache of `one` sequence and of all `sequences`."""

    weights: float
    engine: float
    one: float
    all: float
    sequences: int

    @property
    def least(self) -> float:
        """The bytes that it needs to start."""
        return self.weights + self.engine + self.one

    @property
    def wanted(self) -> float:
        """The bytes with which it generates all sequences at once."""
        return self.weights + self.engine + self.all

    def share(self, total: float, all_at_once: bool = False) -> float:
        """The smallest sufficient share of a GPU of `total` bytes, rounded up to hundredths."""
        return math.ceil(100 * (self.wanted if all_at_once else self.least) / total) / 100

    def described(self) -> str:
        """The sizes in GiB, as one line."""
        return (
            f"vLLM needs {self.least / GIB:.2f} GiB (weights {self.weights / GIB:.2f}, itself "
            f"{self.engine / GIB:.2f}, one sequence {self.one / GIB:.2f}), {self.wanted / GIB:.2f} for all "
            "sequences at once"
        )


def vllm_needs(
    policy: Path | str,
    *,
    max_length: int,
    sequences: int,
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
    batched_tokens: int = 0,
    prompts: int = 0,
    prompt_tokens: int = 0,
) -> VllmNeeds:
    """What an engine on `tensor_parallel` GPUs needs on each, for `sequences` of `max_length` tokens.

    They begin with one of so many `prompts` of `prompt_tokens` each; 0: each has a prompt of its own.
    At its start it runs its largest batch, of `batched_tokens` (0: TRL's 4,096), and it samples from
    the float32 logits of all sequences. It holds the whole model, even where training shards it.
    Raises StageError where the config of `policy` is not known.
    """
    sizes = sizes_of(policy)
    size = 4 if dtype == "float32" else 2
    positions = -(-max_length // BLOCK) * BLOCK
    token = sizes.cache * size / tensor_parallel
    prefix = prompt_tokens // BLOCK * BLOCK if prompts else 0
    tower = sizes.language
    batch = (
        (batched_tokens or BATCH) * size * (2 * tower.inner / tensor_parallel + 4 * tower.hidden)
    )
    logits = 3 * 4 * sequences * sizes.vocabulary
    return VllmNeeds(
        weights=sizes.count * size / tensor_parallel,
        engine=max(ENGINE, GRAPHS + batch + logits),
        one=positions * token,
        all=(max(1, sequences) * (positions - prefix) + prompts * prefix) * token,
        sequences=sequences,
    )


def check_vllm(
    needed: VllmNeeds,
    share: float,
    total: float,
    key: str = KEY,
    say: Callable[[str], None] = print_line,
) -> float:
    """`say` how much vLLM needs and gets; returns the bytes of its `share` of `total`.

    `key` is the name of the share's setting. Raises StageError where vLLM would not start.
    """
    granted = share * total
    say(
        f"{needed.described()}; {key} = {share:g} of {total / GIB:.2f} GiB gives {granted / GIB:.2f}"
    )
    if needed.least > granted:
        least = needed.share(total)
        helps = (
            f"{key} of {least:g} or more"
            if least < 1
            else "a smaller model, or vllm_tensor_parallel_size"
        )
        raise StageError(
            f"{needed.described()}, and {key} = {share:g} of the GPU's {total / GIB:.2f} GiB gives it "
            f"{granted / GIB:.2f}; what helps: {helps}, or a smaller vllm_max_model_length"
        )
    if needed.wanted > granted:
        held = (granted - needed.weights - needed.engine) / needed.all
        at_once = max(1, int(needed.sequences * held))
        say(f"vLLM's cache holds {at_once} sequences at once; the others wait")
    return granted
