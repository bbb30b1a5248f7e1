"""Checks before training that GPU memory, main memory and disk suffice for a round.

The estimates take an `Asked` with a `Place`. Before a run these are made from the settings and the
launcher's file (`pipeline.cli.fits`), in a run from TRL's configuration. No model is loaded for them.
"""

from pathlib import Path
from typing import Any

from tasks.runtime import memory
from training.resources import disk, gpu_memory, main_memory, vllm_memory
from training.resources.asked import Asked, Options, Place
from training.settings import TrainSettings


def of_vllm(asked: Asked) -> vllm_memory.VllmNeeds | None:
    """The memory that a colocated vLLM needs on each GPU; None without one."""
    if not asked.colocated:
        return None
    options, longest = asked.options, asked.prompt[0] + asked.settings.max_completion_length
    tensor_parallel = options.vllm_tensor_parallel_size
    return vllm_memory.vllm_needs(
        asked.policy,
        max_length=options.vllm_max_model_length or longest,
        sequences=asked.at_once * tensor_parallel,
        dtype=asked.settings.dtype,
        tensor_parallel=tensor_parallel,
        prompts=asked.groups * tensor_parallel,
        prompt_tokens=asked.prompt[0],
    )


def check(
    base: Path,
    processor: Any,
    row: dict[str, Any],
    config: Any,
    settings: TrainSettings,
    output: Path,
) -> None:
    """Print what training needs of GPU, main memory and disk; raise StageError if it cannot fit.

    `row` has the longest prompt, and `config` is TRL's. The disk is that of the folder `output`.
    """
    import torch

    cuda = torch.cuda.is_available()
    asked = Asked(
        base,
        gpu_memory.size_of_prompts(processor, [row]),
        settings,
        Options.of(config),
        Place.of_process(config, cuda),
        supervised=not hasattr(config, "num_generations"),
    )
    available, share = gpu_memory.available_memory(), 0.0
    if (engine := of_vllm(asked)) and cuda:
        asked_share, total = asked.options.vllm_gpu_memory_utilization, gpu_memory.total_memory()
        share = vllm_memory.check_vllm(engine, asked_share, total)
    gpu_memory.check(
        gpu_memory.of_gpu(asked), available, share, asked.options.vllm_enable_sleep_mode
    )
    if cuda:
        main_memory.check_main(main_memory.of_main_memory(asked), memory.available())
    disk.check(disk.of_disk(asked), output)
