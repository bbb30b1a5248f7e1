"""Training with weights and states shared out by FSDP2 over processes without GPUs: `torchrun ... FILE`.

accelerate shares out on GPUs alone. Told otherwise it does the same over gloo, so that what is saved
and taken up again can be tried anywhere. FILE has the keyword arguments of several rounds, in order,
and folders to copy before them.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tasks.run import _as_path
from training import grpo as module
from training.sampling import Timed
from training.session import Session


class Sharded:
    """Mixed into the trainer: FSDP2 as a launcher's environment describes it."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.share_out()

    def train(self, *arguments, **given):
        self.share_out()  # again: what accelerate found out by itself has been set meanwhile
        return super().train(*arguments, **given)

    def share_out(self):
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


class ShardedTimed(Timed, Sharded):
    """Takes the place of Timed, which stands right before TRL's own trainer."""


class Judged(Session):
    """A round of which one step was the best."""

    best = 0

    def finish(self, trainer, recorder, stats):
        recorder.watch = SimpleNamespace(best_step=self.best)
        super().finish(trainer, recorder, stats)


def main(path: Path) -> None:
    """Train every round of the file."""
    module.Timed = ShardedTimed  # type: ignore[misc]
    hints = get_type_hints(module.grpo)
    for part in json.loads(path.read_text()):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if os.environ["RANK"] == "0":
            for source, target in part.pop("copy", {}).items():
                shutil.copytree(source, target)
        part.pop("copy", None)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        best = part.pop("best", None)  # step of the best val images, where they are not looked at
        module.Session = type("Session", (Judged,), {"best": best}) if best else Session
        given = {name: _as_path(value, hints[name]) for name, value in part.items()}
        given["output"].mkdir(exist_ok=True)
        module.grpo(**given)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
