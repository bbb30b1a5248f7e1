"""Opens the engine that `[engine] backend` names. Only this module knows all backends.

`vllm` is the offline engine, `ray` the same on each worker of a cluster, `server` any OpenAI-compatible
endpoint, and `transformers` the slow cross-check. A `module:function` is an engine of your own, called
with the policy's folder and the EngineSettings.
"""

import importlib
from pathlib import Path
from typing import Any

from tasks.engines import vllm
from tasks.engines.base import Engine
from tasks.engines.server import ServerEngine
from tasks.engines.settings import BACKENDS, EngineSettings
from tasks.engines.transformers import TransformersEngine
from tasks.runtime.errors import StageError
from tasks.runtime.machine import check_gpu


def open_engine(policy: Path, settings: EngineSettings) -> Engine:
    """The engine that `[engine] backend` names, with the policy loaded.

    Raises StageError when an engine of your own cannot be imported, when the policy's chat template
    takes no image, or when the machine has a GPU that would not be used.
    """
    backend = settings.backend
    if backend in BACKENDS and backend != "server":
        check_gpu()
    if backend in ("vllm", "ray"):  # each worker of a cluster opens its own engine
        on_gpu = vllm.on_gpu()
        kind = vllm.AsyncVllmEngine if on_gpu else vllm.VllmEngine
        return kind(policy, settings)
    if backend == "server":
        return ServerEngine(policy, settings)
    if backend == "transformers":
        return TransformersEngine(policy, settings)
    return custom(backend)(policy, settings)


def custom(backend: str) -> Any:
    """The function that a `module:function` backend names."""
    module, _, name = backend.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise StageError(f"[engine] backend = {backend!r} cannot be imported: {error}") from error
