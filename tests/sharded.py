"""Weights and states shared out by FSDP2 over processes without GPUs: `torchrun ... POLICY OUTPUT`.

accelerate shares out on GPUs alone. Told otherwise it does the same over gloo, so that what is saved
and taken up again can be tried anywhere: two steps of an optimizer with a checkpoint after each, the
end of a round whose first step was the best, and the next round's start from there.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from tests.conftest import settings_of
from training.loop import checkpoints, policy_folder, training_state
from training.loop.session import Session
from training.model.processors import load_processor
from training.settings import TrainSettings


class Sharded(checkpoints.StrictResume, Trainer):
    """A trainer whose launcher's environment describes FSDP2."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # In both states: what accelerate found out by itself is else copied over it later on.
        for state in (PartialState(), self.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        self.is_fsdp_enabled = True


def opened(policy: Path, output: Path) -> Trainer:
    """A trainer at its first step."""
    model = AutoModelForImageTextToText.from_pretrained(policy)
    settings = TrainingArguments(str(output), use_cpu=True, report_to="none", learning_rate=1e-3)
    trainer = Sharded(model=model, args=settings)
    trainer.create_optimizer_and_scheduler(10)
    made = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model, trainer.optimizer = made
    trainer.model_wrapped = trainer.model
    return trainer


def step(trainer: Trainer, folder: Path) -> None:
    """A step of the optimizer, and a checkpoint."""
    for number, parameter in enumerate(trainer.model.parameters()):
        parameter.grad = torch.ones_like(parameter) * (number % 5 - 2)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    folder.mkdir(parents=True, exist_ok=True)
    trainer._save_optimizer_and_scheduler(str(folder))
    trainer._save_rng_state(str(folder))
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(str(folder / training_state.TRAINER))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        checkpoints.mark_complete(folder)


def ended(policy: Path, output: Path, keep_policy: str) -> None:
    """A round of two steps to its end."""
    trainer = opened(policy, output)
    places = [output / checkpoints.FOLDER / f"checkpoint-{number}" for number in (1, 2)]
    for place in places:
        step(trainer, place)
    session = Session.__new__(Session)
    session.output, session.origin = output, policy
    session.processor = load_processor(policy)
    session.settings = settings_of(TrainSettings, keep_policy=keep_policy)
    policy_folder.save(output, trainer, session.processor, policy, "float32")
    chosen = session._keep_best(trainer, places[1], 1)
    if trainer.accelerator.is_main_process:
        training_state.keep(chosen, places[1], output)
    trainer.accelerator.wait_for_everyone()


def gone_on(policy: Path, before: Path, output: Path) -> None:
    """One step from what the round `before` left."""
    trainer = opened(policy, output)
    if trainer.accelerator.is_main_process:
        training_state.resume(before, output / checkpoints.FOLDER, 1)
    trainer.accelerator.wait_for_everyone()
    taken = output / checkpoints.FOLDER / "checkpoint-1"
    trainer._load_from_checkpoint(str(taken), trainer.model_wrapped)
    trainer._load_optimizer_and_scheduler(str(taken))
    step(trainer, output / checkpoints.FOLDER / "checkpoint-2")
    policy_folder.save(output, trainer, load_processor(policy), policy, "float32")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    policy, output = map(Path, sys.argv[1:])
    for kept in ("last", "best"):
        ended(policy, output / kept, kept)
    gone_on(policy, output / "best", output / "next")
