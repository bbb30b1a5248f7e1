"""Helpers for FSDP and DeepSpeed, which shard weights, gradients and states over processes."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def launched_with(kind: str) -> bool:
    """Whether accelerate launched this process with `kind`, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true")


def sharded_by_launcher() -> bool:
    """Whether accelerate launched this process with sharded weights."""
    return launched_with("FSDP") or launched_with("DEEPSPEED")


def reduced_each_time() -> dict[str, Any]:
    """TRL's options that make FSDP reduce gradients after every micro-batch; {} without FSDP.

    Otherwise each process holds the whole model's gradients until a step's last micro-batch: 33 GB
    for a 7B model in float32.
    """
    if not launched_with("FSDP"):
        return {}
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def unreduced(trainer: Any, model: nn.Module) -> AbstractContextManager[Any]:
    """Within this, gradients are not reduced over processes, unless FSDP reduces them every time."""
    accelerator = trainer.accelerator
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    return accelerator.no_sync(model)  # type: ignore[no-any-return]


@contextmanager
def outside_deepspeed() -> Iterator[None]:
    """Within this, transformers loads whole models; under ZeRO-3 it would shard them."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    kept = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            deepspeed.set_hf_deepspeed_config(kept)
