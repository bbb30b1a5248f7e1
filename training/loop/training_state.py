"""Rounds as stretches of one run: what a round leaves behind so that the next goes on from it.

A policy folder holds weights; going on also takes the optimizer's states, the place in the schedule,
the step and the random generators. `keep` leaves these in the folder `state/` beside the policy, and
`resume` makes a checkpoint of them that the trainer takes up. Nothing large is copied on the way: the
files of a finished checkpoint, of the state and of the next round's first checkpoint are the same
files under several names. Sharded optimizers (FSDP, DeepSpeed) keep files of their own form.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.runtime.errors import StageError
from tasks.runtime.links import link, link_tree
from training.loop import state_files

STATE = "state"
OPTIMIZER, SCHEDULER, TRAINER = "optimizer", "scheduler", "trainer_state.json"
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
    for path in (last / ENTROPY, *(chosen / name for name in SHARDED)):
        if path.exists():
            link(path, state / path.name)
    if weights:
        (state / WEIGHTS).mkdir()
        for path in (*chosen.glob("model*.safetensors*"), chosen / "config.json"):
            link(path, state / WEIGHTS / path.name)
    for path in last.glob("rng_state*.pth"):
        state_files.write(state / path.stem, _read_rng(path))
    for checkpoint, name in ((last, SCHEDULER), (chosen, OPTIMIZER)):
        if (checkpoint / f"{name}.pt").exists():  # of an earlier version, which wrote pickles
            state_files.write(state / name, _load(checkpoint / f"{name}.pt"))
        for path in state_files.files(checkpoint / name):
            link(path, state / path.name)
    for path in chosen.iterdir():
        if path.is_dir():
            link_tree(path, state / path.name)


def resume(policy: Path, checkpoints: Path, step: int) -> Path:
    """A checkpoint at `step` made of what the round before left beside its policy.

    Raises StageError where that round kept nothing.
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
                link_tree(path, folder / path.name)
        elif not path.name.startswith("rng_state"):
            if path.name != TRAINER:
                link(path, folder / path.name)
        elif path.suffix == ".json":
            torch.save(state_files.read(path.with_suffix("")), folder / f"{path.stem}.pth")
    if (state / f"{SCHEDULER}.json").exists() and not state_files.files(state / OPTIMIZER):
        # Sharded states are taken up by the libraries, and only where they find their own schedule.
        torch.save(state_files.read(state / SCHEDULER), folder / f"{SCHEDULER}.pt")
    return folder


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_rng(path: Path) -> Any:
    """The generators' states. Numpy's array is the one thing in them that is no tensor or number."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)
