"""Train, the supervised baseline: TRL's SFTTrainer on the right answers to open questions.

    python -m training.sft_baseline recipe.json

It trains the same parts on the same frozen images, with as many optimiser steps and as many questions
a step as GRPO. The loss is the cross-entropy of the completion's tokens. It learns one completion a
question where GRPO samples `num_generations`, so the budgets are equal in steps and questions, and
not in tokens.
"""

from functools import partial
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
    """SFTTrainer that resumes strictly and reads rows in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def sft_baseline(output: Path, *, round: Round, settings: TrainSettings) -> None:
    """Train on the truth for `steps` optimiser steps of `questions_per_step` images each.

    Settings that only sampling needs are ignored.
    """
    session = Session(output, round, settings)
    settings = session.settings
    config = sft_config(output, settings, total_steps=session.total, seed=round.seed)
    questions = session.questions(None)
    rows = session.rows(questions, then=partial(example, style=round.prompt_style))
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


def example(row: dict[str, Any], style: str = "brief") -> dict[str, Any]:
    """A question's row as a supervised example: a thought that names the truth, and the truth as answer.

    The completion has the form that the prompt style asks for.
    """
    name = row["options"][LETTERS.index(row["answer_letter"])]
    completion = prompts.completion(thought(name), name, style)
    return {
        "prompt": row["prompt"],
        "completion": [{"role": "assistant", "content": completion}],
        "image": row["image"],
    }


if __name__ == "__main__":
    main(sft_baseline)
