"""TRL's GRPO trainer, imported without vLLM, whose import takes seconds.

TRL imports vLLM wherever it is installed. Only a training that generates with vLLM needs it:
`import_vllm` has TRL import it then. Every module here takes `GRPOTrainer` from this one.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import import_utils


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within this, the module's attribute `name` is `value`."""
    missing = object()
    kept = getattr(module, name, missing)
    setattr(module, name, value)
    try:
        yield
    finally:
        if kept is missing:
            delattr(module, name)
        else:
            setattr(module, name, kept)


with replaced(import_utils, "is_vllm_available", lambda min_version=None: False):
    import trl.generation.vllm_client as client
    import trl.generation.vllm_generation as generation
    import trl.trainer.grpo_trainer as trainer
GRPOTrainer = trainer.GRPOTrainer


def import_vllm() -> None:
    """Have TRL import vLLM if it is installed. Classes made of TRL's before this stay usable."""
    for module in (client, generation):
        if module.is_vllm_available is not import_utils.is_vllm_available:
            importlib.reload(module)
