"""Checkpoints that training can resume from exactly: marked when complete, restored strictly.

This module works around four weaknesses of the libraries:

- Their checkpoints are not atomic, and the trainer takes a partial one for the latest. Ours contain
  the file `complete`, which is written last.
- A run resumed in the middle of a generation batch trains on other completions. Settings that would
  save a checkpoint there are refused.
- Full weights are loaded non-strictly, so a renamed tensor silently keeps its old values. Ours are
  loaded strictly.
- Optimizer states are pickled. Ours are JSON and safetensors (`state_files`).
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText

from tasks.runtime.errors import StageError
from tasks.tables import shards
from training.loop import state_files

if TYPE_CHECKING:  # StrictResume is mixed into a Trainer
    from transformers import Trainer
else:
    Trainer = object

FOLDER = "checkpoints"
COMPLETE = "complete"


def last_complete(output: Path) -> Path | None:
    """The newest complete checkpoint below `output`, or None."""
    return max(all_complete(output), key=step_of, default=None)


def all_complete(output: Path) -> list[Path]:
    """Every complete checkpoint below `output`, in no order."""
    return [p for p in (output / FOLDER).glob("checkpoint-*") if (p / COMPLETE).exists()]


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def mark_complete(checkpoint: Path) -> None:
    """Sync every file of a checkpoint to disk, then write the mark."""
    shards.sync_tree(checkpoint)
    (checkpoint / COMPLETE).touch()
    shards.sync(checkpoint)


def rotate(output: Path, keep: int, protected: set[int]) -> None:
    """Delete all complete checkpoints but the newest `keep` and those at the `protected` steps."""
    complete = sorted(all_complete(output), key=step_of)
    for checkpoint in complete[:-keep]:
        if step_of(checkpoint) not in protected:
            (checkpoint / COMPLETE).unlink()  # first: a kill halfway must leave no mark
            shutil.rmtree(checkpoint)


def restore_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the model, strictly.

    For a model with adapters these are the adapters' weights. Raises StageError when the adapters'
    tensors are not the same, and RuntimeError when a whole model's are not.
    """
    if not hasattr(model, "peft_config"):
        saved = AutoModelForImageTextToText.from_pretrained(
            checkpoint, use_safetensors=True, dtype=model.dtype
        )
        model.load_state_dict(saved.state_dict(), strict=True)
        return
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(checkpoint), device="cpu")
    expected = get_peft_model_state_dict(model).keys()
    if strange := sorted(weights.keys() ^ expected):
        raise StageError(f"{checkpoint} does not hold this model's adapters: {strange[0]} differs")
    set_peft_model_state_dict(model, weights)


class StrictResume(Trainer):
    """Mixin for trainers: restores weights strictly, and writes optimizer states as safetensors.

    The weights come from the folder `weights`. Under FSDP or DeepSpeed the library's own methods run.
    """

    weights: Path

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.accelerator.unwrap_model(model or self.model)
        restore_weights(target, self.weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            for name, part in self._stateful():
                state_files.write(Path(output_dir) / name, part.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if (
            self.args.device.type == "cpu"
        ):  # with several processes "cpu:0", which torch.load refuses
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        if checkpoint is None or not state_files.files(Path(checkpoint) / "optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)  # sharded, or of an earlier version
            return
        for name, part in self._stateful():
            part.load_state_dict(state_files.read(Path(checkpoint) / name))

    def _stateful(self) -> tuple[tuple[str, Any], ...]:
        return ("optimizer", self.optimizer), ("scheduler", self.lr_scheduler)
