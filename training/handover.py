"""Rounds as stretches of one run: what a round leaves behind so that the next goes on from it.

A policy folder holds weights; going on also takes the optimizer's states, the place in the schedule,
the step and the random generators. `keep` writes these out of a finished checkpoint into the folder
`state/` beside the policy, as safetensors and JSON, without a pickle; `resume` makes a checkpoint
of them that the trainer takes up. Sharded optimizers (FSDP, DeepSpeed) keep files of their own form,
which are carried as they are.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tasks.run import StageError

STATE = "state"
OPTIMIZER, SCHEDULER, TRAINER = "optimizer.pt", "scheduler.pt", "trainer_state.json"
# Files that are carried as they are: TRL's adaptive entropy bonus, which belongs to the schedule, and
# DeepSpeed's pointer and FSDP's full states, which belong to the weights. The last are pickles of
# tensors, which are loaded as such only.
ENTROPY = "entropy_ctrl_state.json"
SHARDED = ("latest", "pytorch_model_fsdp.bin", "optimizer.bin")
WEIGHTS = "weights"  # of full precision, where the policy's own are rounded


def keep(chosen: Path, last: Path, output: Path, weights: bool = False) -> None:
    """Write the folder `state/` of `output` from complete checkpoints.

    The optimizer's states are those of the checkpoint `chosen`, whose weights became the policy;
    schedule, step and generators those of the `last` one, since the next round goes on from there.
    With `weights` those of `chosen` are kept as well: the policy's may be rounded. The same training
    leaves the same bytes: what was logged on the way, times among it, stands in train_log alone.
    """
    state = output / STATE
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    trainer_state = json.loads((last / TRAINER).read_text(encoding="utf-8"))
    _write_json(state / TRAINER, trainer_state | {"log_history": []})
    _copy([last / ENTROPY, *(chosen / name for name in SHARDED)], state)
    if weights:
        _copy([*chosen.glob("*.safetensors*"), chosen / "config.json"], state / WEIGHTS)
    for path in last.glob("rng_state*.pth"):
        _write(state / path.stem, _read_rng(path))
    if (last / SCHEDULER).exists():
        _write(state / "scheduler", _load(last / SCHEDULER))
    if (chosen / OPTIMIZER).exists():
        _write(state / "optimizer", _load(chosen / OPTIMIZER))
    for path in chosen.iterdir():
        if path.is_dir():
            shutil.copytree(path, state / path.name)


def resume(policy: Path, checkpoints: Path, step: int) -> Path:
    """A checkpoint at `step` made of what the round before left beside its policy.

    Raises StageError where that round kept nothing, or ended at another step.
    """
    state = policy / STATE
    if not (state / TRAINER).exists():
        raise StageError(
            f"{policy} kept no training state to go on from; train that round again with [Train] "
            "carry_over = true, or set it to false for this one, too"
        )
    trainer_state = json.loads((state / TRAINER).read_text(encoding="utf-8"))
    folder = checkpoints / f"checkpoint-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_json(folder / TRAINER, trainer_state | {"global_step": step})
    for path in sorted(state.iterdir()):
        if path.is_dir():
            if path.name != WEIGHTS:
                shutil.copytree(path, folder / path.name)
        elif path.name in (ENTROPY, *SHARDED):
            shutil.copyfile(path, folder / path.name)
        elif path.suffix == ".json" and path.name != TRAINER:
            kind = {"optimizer": OPTIMIZER, "scheduler": SCHEDULER}.get(
                path.stem, f"{path.stem}.pth"
            )
            torch.save(_read(path.with_suffix("")), folder / kind)
    return folder


def _copy(files: Iterable[Path], folder: Path) -> None:
    """Those of the files that are there."""
    folder.mkdir(exist_ok=True)
    for path in files:
        if path.exists():
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _write(path: Path, state: Any) -> None:
    """A nest of dictionaries, lists, numbers and tensors as one JSON and one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"array": plain(torch.from_numpy(value.copy())), "dtype": str(value.dtype)}
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
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

    path.with_suffix(".json").write_text(json.dumps(plain(state)), encoding="utf-8")
    save_file(tensors or {"none": torch.zeros(1)}, path.with_suffix(".safetensors"))


def _read(path: Path) -> Any:
    tensors = load_file(path.with_suffix(".safetensors"))

    def rich(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "array" in value:
            return rich(value["array"]).numpy().astype(value["dtype"])
        if "items" in value:
            return {rich(key): rich(item) for key, item in value["items"]}
        if "tuple" in value:
            return tuple(rich(item) for item in value["tuple"])
        return [rich(item) for item in value["list"]]

    return rich(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def _read_rng(path: Path) -> Any:
    """The generators' states. Numpy's array is the one thing in them that is no tensor or number."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)
