"""Whether a colocated vLLM fits into its share of the GPU, in numbers, before anything is loaded.

vLLM takes its share of the whole memory of the GPU, whatever else lies there: its own copy of all
weights, activations and graphs, and the rest as a key-value cache. It does not start where the cache
cannot hold one sequence of `vllm_max_model_length`.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from tasks.run import StageError
from training.sizes import sizes_of

GIB = 1 << 30
ENGINE = 1.0 * GIB  # activations of its largest batch, and CUDA graphs
KEY = "vllm_gpu_memory_utilization"
BLOCK = 16  # positions that vLLM hands out at a time


@dataclass(frozen=True)
class VllmNeeds:
    """Bytes of one engine on one GPU: weights, `one` sequence's cache, that of all at once."""

    weights: float
    one: float
    all: float

    @property
    def least(self) -> float:
        """With less than this it does not start."""
        return self.weights + ENGINE + self.one

    @property
    def wanted(self) -> float:
        """With this all sequences are generated at once."""
        return self.weights + ENGINE + self.all

    def share(self, total: float, all_at_once: bool = False) -> float:
        """The smallest share of a GPU of `total` bytes that would do, in hundredths."""
        return math.ceil(100 * (self.wanted if all_at_once else self.least) / total) / 100

    def told(self) -> str:
        """One line in GiB."""
        return (
            f"vLLM needs {self.least / GIB:.2f} GiB (weights {self.weights / GIB:.2f}, itself "
            f"{ENGINE / GIB:.2f}, one sequence {self.one / GIB:.2f}), {self.wanted / GIB:.2f} for all "
            "sequences at once"
        )


def vllm_needs(
    policy: Path | str,
    *,
    max_length: int,
    sequences: int,
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
) -> VllmNeeds:
    """What an engine of `tensor_parallel` GPUs needs of each for `sequences` of `max_length` tokens.

    The whole model is counted, also where training spreads it. Raises StageError where no config of
    `policy` is known.
    """
    sizes = sizes_of(policy)
    size = 4 if dtype == "float32" else 2
    positions = -(-max_length // BLOCK) * BLOCK
    one = positions * sizes.cache * size / tensor_parallel
    return VllmNeeds(sizes.count * size / tensor_parallel, one, max(1, sequences) * one)


def check_vllm(needed: VllmNeeds, share: float, total: float, key: str = KEY) -> float:
    """Say how much vLLM gets and needs; returns the bytes of its share of `total`.

    `key` names the setting of the share. Raises StageError where vLLM would not start.
    """
    given = share * total
    print(
        f"train: {needed.told()}; {key} = {share:g} of {total / GIB:.2f} GiB gives {given / GIB:.2f}",
        flush=True,
    )
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
        at_once = int((given - needed.weights - ENGINE) // needed.one)
        print(f"train: vLLM's cache holds {at_once} sequences at once; the others wait", flush=True)
    return given
