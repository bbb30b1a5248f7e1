"""A trainer's state as JSON and safetensors, without a pickle: written and read tensor by tensor.

A nest of dictionaries, lists, numbers and tensors becomes `NAME.json`, in which each tensor is a
reference, and `NAME-00001.safetensors` and so on. Tensors are written from where they lie, and read
as pages of the file, so that neither way holds a second copy of an optimizer's states in memory.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tasks.runtime.errors import StageError

FILE_BYTES = 256 << 20  # of tensors in a file; those of a GPU are held so far while it is written


def write(path: Path, state: Any) -> None:
    """Write a state under the name `path`, which has no suffix.

    The same state leaves the same bytes. Raises StageError for a value of another kind.
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

    told = plain(state)
    tensors.flush()
    path.with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")


def read(path: Path) -> Any:
    """The state that was written under this name. Its tensors are pages of the files until they are
    changed, which changes no file."""
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
    """The files of the state of this name, those that are there."""
    numbered = sorted(path.parent.glob(f"{path.name}-[0-9]*.safetensors"))
    one = [path.with_suffix(".json"), _file(path, None)]
    return [*(each for each in one if each.exists()), *numbered]


class _Writer:
    """Gathers tensors until they fill a file."""

    def __init__(self, path: Path):
        self.path, self.number, self.bytes = path, 1, 0
        self.waiting: dict[str, torch.Tensor] = {}
        self.known: dict[tuple, dict[str, Any]] = {}  # of a tensor that stands in several places

    def add(self, tensor: torch.Tensor) -> dict[str, Any]:
        """A reference to the tensor."""
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self.known:
            return self.known[key]
        if self.waiting and self.bytes + tensor.nbytes > FILE_BYTES:
            self.flush()
            self.number += 1
        held = tensor.cpu().contiguous()
        if held.untyped_storage().nbytes() != held.nbytes:  # a part of something larger
            held = held.clone()
        name = str(len(self.known))
        self.waiting[name] = held
        self.bytes += held.nbytes
        self.known[key] = {"tensor": name, "file": self.number}
        return self.known[key]

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            save_file(self.waiting, _file(self.path, self.number))
        self.waiting, self.bytes = {}, 0


def _file(path: Path, number: int | None) -> Path:
    """A file of tensors; states that an earlier version wrote have one without a number."""
    name = path.name if number is None else f"{path.name}-{number:05d}"
    return path.with_name(f"{name}.safetensors")
