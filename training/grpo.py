"""Train: GRPO on frozen questions.

    python -m training.grpo recipe.json
    accelerate launch -m training.grpo recipe.json

TRL's GRPOTrainer does the reinforcement learning. This project adds:

- Training reads frozen shards only, and checks each against its manifest.
- Rewards parse answers with the evaluation's own parser.
- All rounds are one run, and a killed run resumes exactly from its last complete checkpoint.
- transformers, vLLM and PEFT load the resulting folder.

    loop/           one round: sampling, log, validation, checkpoints, resuming, training state
    model/          the model: loading, freezing, LoRA, sharding; vLLM inside the trainer
    data/           questions -> rows, rewards by name
    resources/      estimates of memory and disk, and a trial of the largest batch
    shared_prefix/  the trainer, which computes a group's image and prompt once
    settings.py     the settings of [BasePolicy] and [Train], and a round's inputs
"""

import sys
from pathlib import Path
from typing import Any

from tasks.runtime import waiting
from tasks.runtime.command import main
from training.data.reward_choice import choose_rewards
from training.loop import vllm_check
from training.loop.context_length import longest_row, set_context
from training.loop.log import Recorder
from training.loop.sampling import trainer_of
from training.loop.session import Session
from training.loop.trl_settings import grpo_config, of_reference_alone
from training.resources.largest_batch import try_largest
from training.round_rules import check_questions
from training.settings import Round, TrainSettings


def grpo(output: Path, *, round: Round, settings: TrainSettings) -> None:
    """Train for `steps` optimiser steps of `questions_per_step` groups each.

    Writes the policy folder, `train_log.parquet` and `completions-*.parquet`. Raises StageError for
    a damaged shard, an unknown option, a batch that cannot be divided, or memory that is not there.
    """
    session = Session(output, round, settings)
    settings = session.settings
    rewards = list(settings.rewards)
    reward_functions = choose_rewards(settings, session.cards, session.count_tokens, round.reading)
    style = round.prompt_style
    check_questions(settings, ask=round.ask, pairs=round.pairs, prompt_style=style)
    config = grpo_config(
        output, settings, total_steps=session.total, seed=round.seed, pairs=round.pairs
    )
    questions = session.questions(style if round.ask == "mcq" else None)
    rows = session.rows(questions)
    if questions.pairs:
        total, plain = len(questions.image_ids), questions.pairs.plain
        print(f"train: {total - plain} of {total} questions have a partner; {plain} stay plain")
    largest, prompt = longest_row(questions, session.watch, session.processor)
    set_context(config, prompt)
    model, adapters = session.model(config, largest)
    starts = "the trainer and its vLLM start" if config.use_vllm else "the trainer starts"
    with waiting.loading(f"train: {starts}"), of_reference_alone(settings.trl):
        trainer = trainer_of(
            settings,
            truth_rollout=round.truth_rollout,
            model=model,
            args=config,
            processing_class=session.processor,
            train_dataset=rows,
            reward_funcs=reward_functions,
            peft_config=adapters,
        )
    trainer.further, trainer.style = questions.further, style

    def before() -> None:
        if config.use_vllm:
            vllm_check.check_vllm(trainer, [rows[i] for i in range(min(8, len(rows)))])
        if settings.check_largest_batch and trainer.state.global_step < session.stop:
            try_largest(trainer, largest, prompt)

    recorder = session.train(trainer, Recorder, rewards, before)
    counts = {"plain_questions": questions.pairs.plain} if questions.pairs else {}
    session.finish(trainer, recorder, figures(recorder.log, config) | counts)
    if trainer.accelerator.is_main_process:
        print(f"train: first and last steps: {summary(recorder.log, rewards)}")
        for name in uncounted(recorder.log, rewards):
            print(
                f"train: reward {name} has scored no completion of this round, so that nothing was "
                "learned from it",
                file=sys.stderr,
            )


def figures(log: list[dict[str, Any]], config: Any) -> dict[str, Any]:
    """A round's counts for its manifest: completions, and the share of zero-variance groups."""
    dead = _values(log, "dead_group_share")
    return {
        "completions": config.generation_batch_size * len(log),
        "dead_group_share": sum(dead) / len(dead) if dead else None,
    }


def summary(log: list[dict[str, Any]], rewards: list[str]) -> str:
    """The last line: each mean reward over the first and last fifth, and the first and last val accuracy."""
    fifth = max(1, len(log) // 5)
    parts = [
        f"{name} never scored"
        if name in uncounted(log, rewards)
        else f"{name} {_mean(log[:fifth], f'reward/{name}'):.3f} -> {_mean(log[-fifth:], f'reward/{name}'):.3f}"
        for name in rewards
    ]
    if seen := _values(log, "val_accuracy"):
        parts.append(f"open answers on val {seen[0]:.3f} -> {seen[-1]:.3f}")
    parts.append(f"{_mean(log, 'dead_group_share'):.0%} of the groups without a gradient")
    return ", ".join(parts)


def uncounted(log: list[dict[str, Any]], rewards: list[str]) -> list[str]:
    """The rewards that scored no completion in any step of the log."""
    return [name for name in rewards if not _values(log, f"reward/{name}")]


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = _values(rows, key)
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main(grpo)
