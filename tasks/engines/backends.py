"""The one place that knows every backend: `[engine] backend` to the engine that it names.

`vllm` is the offline engine, `ray` the same on each worker of a cluster, `server` any OpenAI-compatible
endpoint, `transformers` the slow cross-check, and a `module:function` names your own, called with the
policy's folder and the EngineSettings.
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

    Raises StageError when your own cannot be imported, the policy's chat template takes no image, or a
    GPU is there that would not be used.
    """
    backend = settings.backend
    if backend in BACKENDS and backend != "server":
        check_gpu()
    if backend in ("vllm", "ray"):  # on a cluster, each worker has an engine of its own
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
