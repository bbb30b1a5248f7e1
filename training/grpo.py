"""Train: GRPO on frozen questions.

    python -m training.grpo CONFIG.json
    accelerate launch -m training.grpo CONFIG.json

TRL's GRPOTrainer does the reinforcement learning. What is ours: only frozen shards go in, each
checked against its manifest; the reward is the evaluation's own parser; rounds are stretches of one
run; a killed run goes on from its last complete checkpoint as if nothing had been; and what comes
out is a folder that transformers, vLLM and PEFT load.

    loop/           one round, start to end: what is sampled, logged and kept, and going on after a kill
    model/          the model: loaded, frozen in parts, with adapters; vLLM inside the trainer
    data/           questions -> rows, rewards by name
    resources/      whether it will fit, and whether it does
    shared_prefix/  how it is trained: a group's image and prompt computed once
    settings.py     [BasePolicy], [Train], and what else a round is told
"""

from pathlib import Path
from typing import Any

from tasks.runtime import waiting
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from training.data.reward_choice import choose_rewards
from training.loop import vllm_check
from training.loop.context_length import longest_row, set_context
from training.loop.log import Recorder
from training.loop.sampling import trainer_of
from training.loop.session import Session
from training.loop.trl_settings import grpo_config, of_reference_alone
from training.resources.largest_batch import try_largest
from training.settings import Round, TrainSettings


def grpo(output: Path, *, round: Round, settings: TrainSettings) -> None:
    """Train for `steps` optimiser steps of `questions_per_step` groups each.

    Writes the policy folder, `train_log.parquet` and `completions-*.parquet`. Raises StageError for
    a damaged shard, an unknown option, a batch that cannot be divided, or memory that is not there.
    """
    session = Session(output, round, settings)
    rewards = list(settings.rewards)
    chosen = choose_rewards(settings.rewards, session.cards, settings.max_completion_length)
    config = grpo_config(output, settings, total_steps=session.total, seed=round.seed)
    check_scaling(settings.rewards, config)
    if round.ask == "open" and settings.order == "curriculum":
        raise StageError("[Train] order = curriculum needs candidates; open questions have none")
    if settings.quantized and config.use_vllm:
        raise StageError(
            '[Train] quantize does not go with vLLM in the trainer; set "use_vllm": false in trl'
        )
    questions = session.questions(round.prompt_style if round.ask == "mcq" else None)
    rows = session.rows(questions)
    some = [rows[i] for i in range(min(8, len(rows)))]
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
            reward_funcs=chosen,
            peft_config=adapters,
        )
    trainer.further = questions.further

    def before() -> None:
        if config.use_vllm:
            vllm_check.check_vllm(trainer, some)
        if settings.check_largest_batch and trainer.state.global_step < session.stop:
            try_largest(trainer, largest, prompt)

    recorder = session.train(trainer, Recorder, rewards, before)
    session.finish(trainer, recorder, figures(recorder.log, config))
    if trainer.accelerator.is_main_process:
        print(f"train: first and last steps: {told(recorder.log, rewards)}")


def check_scaling(rewards: dict[str, float], config: Any) -> None:
    """Refuse a weight by difficulty that the division by a group's spread would take out again."""
    if "difficulty_weighted" not in rewards:
        return
    if config.multi_objective_aggregation == "normalize_then_sum":
        raise StageError("[Train] rewards: difficulty_weighted is lost in normalize_then_sum")
    if config.scale_rewards in ("group", True):
        raise StageError(
            "[Train] rewards: difficulty_weighted is divided away again where advantages are scaled "
            'by group; set "scale_rewards": "batch" or "none" in trl'
        )


def figures(log: list[dict[str, Any]], config: Any) -> dict[str, Any]:
    """The counts of a round, for its manifest."""
    dead = _values(log, "dead_group_share")
    return {
        "completions": config.generation_batch_size * len(log),
        "dead_group_share": sum(dead) / len(dead) if dead else None,
    }


def told(log: list[dict[str, Any]], rewards: list[str]) -> str:
    """The closing line: each reward, and open recognition, in the first fifth and in the last."""
    fifth = max(1, len(log) // 5)
    parts = [
        f"{name} {_mean(log[:fifth], f'reward/{name}'):.3f} -> {_mean(log[-fifth:], f'reward/{name}'):.3f}"
        for name in rewards
    ]
    if seen := _values(log, "val_accuracy"):
        parts.append(f"open answers on val {seen[0]:.3f} -> {seen[-1]:.3f}")
    parts.append(f"{_mean(log, 'dead_group_share'):.0%} of the groups without a gradient")
    return ", ".join(parts)


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = _values(rows, key)
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main(grpo)
