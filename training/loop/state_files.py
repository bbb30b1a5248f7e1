"""Writes and reads a trainer's state as JSON and safetensors, without a pickle.

Nested dictionaries, lists, numbers and tensors become `NAME.json`, which refers to each tensor by
name, and `NAME-00001.safetensors` and so on. Tensors are written file by file, and read memory-mapped,
so neither writing nor reading holds a second copy of an optimizer's states in memory.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.runtime.errors import StageError

FILE_BYTES = (
    256 << 20
)  # of tensors in a file; of a GPU's tensors at most these are copied to main memory at a time


def write(path: Path, state: Any) -> None:
    """Write a state under the name `path`, which has no suffix.

    Equal states give equal bytes. Raises StageError for a value of any other type.
    """
    for old in files(path):
        old.unlink()
    tensors = _Writer(path)

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"array": plain(torch.from_numpy(value.copy())), "dtype": str(value.dtype)}
        if isinstance(value, torch.Tensor):
            return tensors.add(value.detach())
        if isinstance(value, dict):
            return {"items": [[plain(key), plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [plain(item) for item in value]}
        if isinstance(value, np.generic):
            return value.item()
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise StageError(
            f"{path.name}: a {type(value).__name__} cannot be carried to the next round"
        )

    values = plain(state)
    tensors.flush()
    path.with_suffix(".json").write_text(json.dumps(values), encoding="utf-8")


def read(path: Path) -> Any:
    """The state that was written under the name `path`.

    Its tensors are memory-mapped. Changing one copies it and leaves the file as it is.
    """
    opened: dict[Path, Any] = {}

    def tensor(name: str, number: int | None) -> torch.Tensor:
        place = _file(path, number)
        if place not in opened:
            opened[place] = safe_open(place, framework="pt")
        return opened[place].get_tensor(name)

    def rich(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensor(value["tensor"], value.get("file"))
        if "array" in value:
            return rich(value["array"]).numpy().astype(value["dtype"])
        if "items" in value:
            return {rich(key): rich(item) for key, item in value["items"]}
        if "tuple" in value:
            return tuple(rich(item) for item in value["tuple"])
        return [rich(item) for item in value["list"]]

    return rich(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def files(path: Path) -> list[Path]:
    """The files that exist of the state with this name."""
    numbered = sorted(path.parent.glob(f"{path.name}-[0-9]*.safetensors"))
    one = [path.with_suffix(".json"), _file(path, None)]
    return [*(each for each in one if each.exists()), *numbered]


class _Writer:
    """Collects tensors and writes them as a file whenever they reach FILE_BYTES."""

    def __init__(self, path: Path):
        self.path, self.number, self.bytes = path, 1, 0
        self.waiting: dict[str, torch.Tensor] = {}
        self.known: dict[
            tuple, dict[str, Any]
        ] = {}  # references to tensors, so that a tensor in several places is written once

    def add(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Collect a tensor; returns the reference that stands for it in the JSON."""
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self.known:
            return self.known[key]
        if self.waiting and self.bytes + tensor.nbytes > FILE_BYTES:
            self.flush()
            self.number += 1
        data = tensor.cpu().contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:  # a view of a larger tensor
            data = data.clone()
        name = str(len(self.known))
        self.waiting[name] = data
        self.bytes += data.nbytes
        self.known[key] = {"tensor": name, "file": self.number}
        return self.known[key]

    def flush(self) -> None:
        """Write the collected tensors to a file."""
        if self.waiting:
            save_file(self.waiting, _file(self.path, self.number))
        self.waiting, self.bytes = {}, 0


def _file(path: Path, number: int | None) -> Path:
    """The path of a file of tensors; without a number for states of earlier versions."""
    name = path.name if number is None else f"{path.name}-{number:05d}"
    return path.with_name(f"{name}.safetensors")
