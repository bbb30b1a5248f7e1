"""Checkpoints one can go on from: complete, on a boundary, and taken up to the last tensor.

Four things of the libraries are mended here. Their checkpoints are not atomic, and a partial one is
taken for the latest: ours carry a mark that is written last. A checkpoint in the middle of a batch
of generations goes on with other completions: such settings are refused. Full weights are taken up
by name and non-strictly, so that renamed tensors silently stay as they were: ours are all or none.
An optimizer's states are pickled in one piece: ours are written once, in the form they are kept in.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText

from tasks.runtime.errors import StageError
from tasks.tables import shards
from training.loop import state_files
from training.settings import TrainSettings

if TYPE_CHECKING:  # what StrictResume is mixed into
    from transformers import Trainer
else:
    Trainer = object

FOLDER = "checkpoints"
COMPLETE = "complete"


def last_complete(output: Path) -> Path | None:
    """The newest checkpoint below `output` that was written to its end."""
    return max(all_complete(output), key=step_of, default=None)


def all_complete(output: Path) -> list[Path]:
    """Every checkpoint below `output` that was written to its end."""
    return [p for p in (output / FOLDER).glob("checkpoint-*") if (p / COMPLETE).exists()]


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was written after."""
    return int(checkpoint.name.split("-")[1])


def mark_complete(checkpoint: Path) -> None:
    """Put every file of a checkpoint on disk, and then the mark."""
    shards.sync_tree(checkpoint)
    (checkpoint / COMPLETE).touch()
    shards.sync(checkpoint)


def rotate(output: Path, keep: int, besides: set[int]) -> None:
    """Delete all but the newest `keep` complete checkpoints and those of the steps `besides`."""
    complete = sorted(all_complete(output), key=step_of)
    for checkpoint in complete[:-keep]:
        if step_of(checkpoint) not in besides:
            (checkpoint / COMPLETE).unlink()  # first: a kill halfway must not leave a marked ruin
            shutil.rmtree(checkpoint)


def check_boundaries(settings: TrainSettings, config: Any) -> None:
    """Refuse settings whose checkpoints would fall between the uses of one generation.

    `config` is TRL's. Raises StageError with a value that works.
    """
    accumulation = config.gradient_accumulation_steps
    uses = config.steps_per_generation * config.num_iterations
    every = uses // accumulation if uses % accumulation == 0 else uses
    for key, steps in (
        ("save_steps", settings.save_steps),
        ("steps", settings.steps),
        ("watch_every", settings.watch_every),
    ):
        if steps * accumulation % uses:
            raise StageError(
                f"[Train] {key} = {steps} ends between the {uses} uses of one batch of "
                f"completions, where training cannot go on exactly; set it to a multiple of {every}"
            )


def restore_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model, every tensor or none.

    Of a model with adapters these are the adapters' weights. Raises StageError when a tensor is
    missing or left over.
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
    """For trainers: weights are restored as above from `weights`, states written as safetensors.

    What FSDP or DeepSpeed shares out is written and restored by their own means.
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
            for name, held in self._held():
                state_files.write(Path(output_dir) / name, held.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.args.device.type == "cpu":  # of several processes it is "cpu:0": torch.load refuses
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        if checkpoint is None or not state_files.files(Path(checkpoint) / "optimizer"):
            super()._load_optimizer_and_scheduler(checkpoint)  # sharded, or of an earlier version
            return
        for name, held in self._held():
            held.load_state_dict(state_files.read(Path(checkpoint) / name))

    def _held(self) -> tuple[tuple[str, Any], ...]:
        return ("optimizer", self.optimizer), ("scheduler", self.lr_scheduler)
