"""Train, the supervised baseline: the answer to the open question is taught, not found.

    python -m training.sft_baseline CONFIG.json

TRL's SFTTrainer on the same frozen images, with the same parts trained, for as many optimiser steps
of as many questions as GRPO takes; the loss is that of the completion's tokens. One completion a
question is learned where GRPO samples `num_generations`, so the equal budget is of steps and
questions, not of tokens.
"""

from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler
from trl import SFTTrainer

from tasks.language import prompts
from tasks.language.prompts import LETTERS
from tasks.runtime.command import main
from training.data.sft_examples import thought
from training.loop import checkpoints
from training.loop.context_length import longest_row
from training.loop.log import SupervisedRecorder
from training.loop.session import Session
from training.loop.trl_settings import sft_config
from training.settings import Round, TrainSettings


class Supervised(checkpoints.StrictResume, SFTTrainer):
    """SFTTrainer, resumed strictly, on rows in the order they come in."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def sft_baseline(output: Path, *, round: Round, settings: TrainSettings) -> None:
    """Teach the truth for `steps` optimiser steps of `questions_per_step` images each.

    What only sampling needs of the settings is passed over.
    """
    session = Session(output, round, settings)
    config = sft_config(output, settings, total_steps=session.total, seed=round.seed)
    questions = session.questions(None)
    rows = session.rows(questions, then=example)
    largest, _ = longest_row(questions, None, session.processor)
    model, adapters = session.model(config, largest)
    trainer = Supervised(
        model=model,
        args=config,
        processing_class=session.processor,
        train_dataset=rows,
        peft_config=adapters,
    )
    recorder = session.train(trainer, SupervisedRecorder, [])
    log = recorder.log
    session.finish(trainer, recorder, {"examples": settings.questions_per_step * len(log)})
    if trainer.accelerator.is_main_process:
        print(f"train: loss {log[0]['loss']:.3f} -> {log[-1]['loss']:.3f} in {len(log)} steps")


def example(row: dict[str, Any]) -> dict[str, Any]:
    """A question's row as prompt and completion: what it looks like, and the truth as the answer."""
    name = row["options"][LETTERS.index(row["answer_letter"])]
    said = prompts.completion(thought(name), name)
    return {
        "prompt": row["prompt"],
        "completion": [{"role": "assistant", "content": said}],
        "image": row["image"],
    }


if __name__ == "__main__":
    main(sft_baseline)
