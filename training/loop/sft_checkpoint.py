"""The checkpoint of supervised training: weights, optimizers, schedules, generators, losses.

It is one file. A new checkpoint replaces the old one atomically, so a killed run leaves a complete
one. The pipeline deletes its folder when the stage is done. Reading it loads tensors and never runs
code.
"""

import os
from pathlib import Path
from typing import Any

import torch

from tasks.runtime.errors import StageError
from tasks.tables import shards
from training.loop.checkpoints import FOLDER

FILE = "supervised.pt"


def place(output: Path) -> Path:
    """The checkpoint's path, for the stage whose folder is `output`."""
    return output / FOLDER / FILE


class State:
    """The training state: everything that the next step depends on, except its batch."""

    def __init__(self, model: torch.nn.Module, optimizers: list[Any], schedules: list[Any]):
        self.parts = {"model": [model], "optimizers": optimizers, "schedules": schedules}

    def save(self, path: Path, steps: int, losses: list[float]) -> None:
        """Write the state after `steps` steps; `losses` are those of the last steps."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        states = {name: [each.state_dict() for each in part] for name, part in self.parts.items()}
        torch.save({"steps": steps, "losses": losses, "generators": _generators(), **states}, fresh)
        shards.sync(fresh)
        os.replace(fresh, path)
        shards.sync(path.parent)

    def load(self, path: Path) -> tuple[int, list[float]]:
        """Load the state in `path`; returns the steps done and the last losses: 0 and [] without it.

        Raises StageError when the state does not fit this model.
        """
        if not path.exists():
            return 0, []
        try:
            states = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                for each, state in zip(part, states[name], strict=True):
                    each.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise StageError(
                f"{path} does not fit this training; delete it to start anew"
            ) from error
        _set_generators(states["generators"])
        return states["steps"], states["losses"]


def _generators() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
