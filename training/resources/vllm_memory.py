"""Whether a colocated vLLM fits into its share of the GPU, in numbers, before anything is loaded.

vLLM takes its share of the whole memory of the GPU, whatever else lies there: its own copy of all
weights, activations and graphs, and the rest as a key-value cache. It does not start where the cache
cannot hold one sequence of `vllm_max_model_length`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from training.resources.main_memory import told
from training.resources.sizes import sizes_of

GIB = 1 << 30
ENGINE, GRAPHS = 1.0 * GIB, 0.5 * GIB  # what it takes at least for itself, CUDA graphs among it
BATCH = 4096  # tokens: what TRL gives a colocated engine
KEY = "vllm_gpu_memory_utilization"
BLOCK = 16  # positions that vLLM hands out at a time


@dataclass(frozen=True)
class VllmNeeds:
    """Bytes of one engine on one GPU: weights, itself, `one` sequence's cache, that of all at once."""

    weights: float
    engine: float
    one: float
    all: float

    @property
    def least(self) -> float:
        """With less than this it does not start."""
        return self.weights + self.engine + self.one

    @property
    def wanted(self) -> float:
        """With this all sequences are generated at once."""
        return self.weights + self.engine + self.all

    def share(self, total: float, all_at_once: bool = False) -> float:
        """The smallest share of a GPU of `total` bytes that would do, in hundredths."""
        return math.ceil(100 * (self.wanted if all_at_once else self.least) / total) / 100

    def told(self) -> str:
        """One line in GiB."""
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
) -> VllmNeeds:
    """What an engine of `tensor_parallel` GPUs needs of each for `sequences` of `max_length` tokens.

    It tries its largest batch at the start, of `batched_tokens` (0: TRL's 4,096), and samples from
    the float32 logits of all sequences.

    The whole model is counted, also where training spreads it. Raises StageError where no config of
    `policy` is known.
    """
    sizes = sizes_of(policy)
    size = 4 if dtype == "float32" else 2
    positions = -(-max_length // BLOCK) * BLOCK
    one = positions * sizes.cache * size / tensor_parallel
    tower = sizes.language
    batch = (
        (batched_tokens or BATCH) * size * (2 * tower.inner / tensor_parallel + 4 * tower.hidden)
    )
    logits = 3 * 4 * sequences * sizes.vocabulary
    return VllmNeeds(
        weights=sizes.count * size / tensor_parallel,
        engine=max(ENGINE, GRAPHS + batch + logits),
        one=one,
        all=max(1, sequences) * one,
    )


def check_vllm(
    needed: VllmNeeds, share: float, total: float, key: str = KEY, say: Callable[[str], None] = told
) -> float:
    """`say` how much vLLM gets and needs; returns the bytes of its share of `total`.

    `key` names the setting of the share. Raises StageError where vLLM would not start.
    """
    given = share * total
    say(f"{needed.told()}; {key} = {share:g} of {total / GIB:.2f} GiB gives {given / GIB:.2f}")
    if needed.least > given:
        least = needed.share(total)
        helps = (
            f"{key} of {least:g} or more"
            if least < 1
            else "a smaller model, or vllm_tensor_parallel_size"
        )
        raise StageError(
            f"{needed.told()}, and {key} = {share:g} of the GPU's {total / GIB:.2f} GiB gives it "
            f"{given / GIB:.2f}; what helps: {helps}, or a smaller vllm_max_model_length"
        )
    if needed.wanted > given:
        at_once = int((given - needed.weights - needed.engine) // needed.one)
        say(f"vLLM's cache holds {at_once} sequences at once; the others wait")
    return given
