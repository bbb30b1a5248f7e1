"""Hands the training state from one round to the next, so that all rounds are one run.

A policy folder holds weights. To go on, the next round also needs the optimizer's states, the
schedule, the step and the random generators. `keep` writes these to the folder `state/` beside the
policy; `resume` makes a checkpoint of them, from which the trainer resumes. Large files are hard
links, not copies: a finished checkpoint, the state and the next round's first checkpoint share them.
Sharded optimizers (FSDP, DeepSpeed) keep their own file formats.
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
# Files that are linked unchanged. The state of TRL's adaptive entropy bonus belongs to the schedule.
# DeepSpeed's pointer file and FSDP's full states belong to the weights; the latter are pickles, which
# are loaded as tensors only.
ENTROPY = "entropy_ctrl_state.json"
SHARDED = ("latest", "pytorch_model_fsdp.bin", "optimizer.bin")
WEIGHTS = "weights"  # folder of the float32 weights, where the policy's are rounded


def keep(policy_checkpoint: Path, last: Path, output: Path, weights: bool = False) -> None:
    """Write the folder `state/` of `output` from two complete checkpoints.

    The optimizer's states come from `policy_checkpoint`, whose weights became the policy. Schedule,
    step and generators come from `last`, where the next round goes on. With `weights` the weights of
    `policy_checkpoint` are kept, too, because the policy's may be rounded. The trainer's log, which
    holds times, is left out, so that equal training leaves equal bytes.
    """
    state = output / STATE
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    trainer_state = json.loads((last / TRAINER).read_text(encoding="utf-8"))
    _write_json(state / TRAINER, trainer_state | {"log_history": []})
    for path in (last / ENTROPY, *(policy_checkpoint / name for name in SHARDED)):
        if path.exists():
            link(path, state / path.name)
    if weights:
        (state / WEIGHTS).mkdir()
        for path in (
            *policy_checkpoint.glob("model*.safetensors*"),
            policy_checkpoint / "config.json",
        ):
            link(path, state / WEIGHTS / path.name)
    for path in last.glob("rng_state*.pth"):
        state_files.write(state / path.stem, _read_rng(path))
    for checkpoint, name in ((last, SCHEDULER), (policy_checkpoint, OPTIMIZER)):
        if (checkpoint / f"{name}.pt").exists():  # a pickle, from an earlier version
            state_files.write(state / name, _load(checkpoint / f"{name}.pt"))
        for path in state_files.files(checkpoint / name):
            link(path, state / path.name)
    for path in policy_checkpoint.iterdir():
        if path.is_dir():
            link_tree(path, state / path.name)


def resume(policy: Path, checkpoints: Path, step: int) -> Path:
    """Make a checkpoint at `step` from the training state of the round before; returns its folder.

    `policy` is that round's folder. Raises StageError where it has no training state.
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
        # The libraries load sharded states only when they find a schedule in their own format.
        torch.save(state_files.read(state / SCHEDULER), folder / f"{SCHEDULER}.pt")
    return folder


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_rng(path: Path) -> Any:
    """The generators' states. They hold a numpy array, which torch must be allowed to load."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)
