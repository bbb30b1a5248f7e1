"""Weights, gradients and states shared out over processes, by FSDP or DeepSpeed."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn


def launched_with(kind: str) -> bool:
    """Whether accelerate launched this process with `kind`, FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true")


def sharded_by_launcher() -> bool:
    """Whether accelerate launched this process to share its weights with others."""
    return launched_with("FSDP") or launched_with("DEEPSPEED")


def reduced_each_time() -> dict[str, Any]:
    """TRL's options by which FSDP reduces gradients after every micro-batch; none without FSDP.

    Unreduced, each process would hold those of the whole model until the last one: 33 GB for a 7B in
    float32.
    """
    if not launched_with("FSDP"):
        return {}
    return {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}


def unreduced(trainer: Any, model: nn.Module) -> AbstractContextManager[Any]:
    """Gradients stay on their process meanwhile, unless they are to be reduced every time."""
    accelerator = trainer.accelerator
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return nullcontext()
    return accelerator.no_sync(model)  # type: ignore[no-any-return]


@contextmanager
def outside_deepspeed() -> Iterator[None]:
    """Make models whole: under ZeRO-3 transformers would share out what one process loads alone."""
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    kept = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            deepspeed.set_hf_deepspeed_config(kept)
