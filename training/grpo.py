"""Train: GRPO on frozen multiple-choice questions.

    python -m training.grpo CONFIG.json
    accelerate launch -m training.grpo CONFIG.json

TRL's GRPOTrainer does the reinforcement learning. What is ours: only frozen shards go in, each
checked against its manifest; the reward is the evaluation's own parser; a killed run goes on from
its last complete checkpoint; and what comes out is a folder that transformers and vLLM load.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from data_cards import load
from tasks import schemas, shards
from tasks.run import StageError, main, progress
from training.dataset import training_rows
from training.rewards import format_reward, letter_reward

Reward = Callable[..., list[float]]
REWARDS: dict[str, Reward] = {"format": format_reward, "letter": letter_reward}
VISION = ("visual", "vision", "projector")  # in the parameter names of every family we know
CACHE = "cache"  # of the questions, below the output; gone when the stage has ended
COMPLETE = "complete"  # written last into a checkpoint: TRL's own are not atomic

# Trainer's log key -> our column (tasks.schemas.train_log).
LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "reward": "reward",
    "reward_std": "reward_std",
    "rewards/format_reward/mean": "format_reward",
    "rewards/letter_reward/mean": "letter_reward",
    "frac_reward_zero_std": "dead_group_share",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "completion_length",
    "completions/clipped_ratio": "clipped_share",
    "step_time": "seconds",
}
OURS = {
    "output_dir",
    "max_steps",
    "learning_rate",
    "num_generations",
    "max_completion_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "save_steps",
    "reward_weights",
}


def grpo(
    output: Path,
    *,
    card: str,
    mcq: list[Path],
    policy: Path,
    prompt_style: str,
    dtype: str,
    order: str,
    freeze: str,
    steps: int,
    questions_per_step: int,
    num_generations: int,
    max_completion_length: int,
    learning_rate: float,
    rewards: dict[str, float],
    trl: dict[str, Any],
    micro_batch_size: int,
    save_steps: int,
    refresh_round: int,
    seed: int,
) -> None:
    """Train `policy` for `steps` optimiser steps of `questions_per_step` groups each.

    `card` is one card's name, or several joined by +, with a folder of questions each in `mcq`.

    `order` is that of the questions (`training.dataset`); `freeze` leaves a part as it is: none,
    vision or language. `rewards` maps a reward's name (format, letter) to its weight; `trl` holds
    any further GRPOConfig option. Writes the policy folder, `train_log.parquet` and
    `completions-*.parquet`.
    Raises StageError for a damaged shard, an unknown option or a batch that cannot be divided.
    """
    disable_progress_bar()  # of the libraries: one bar a stage is enough
    disable_progress_bars()
    cards = [load(name) for name in card.split("+")]
    for folder in mcq:
        verify(folder)
    config = _config(output, locals())
    data = training_rows(
        mcq,
        cards,
        prompt_style,
        num_uses=steps * questions_per_step,
        seed=seed,
        round_=refresh_round,
        cache=output / CACHE,
        order=order,
    )
    processor = AutoProcessor.from_pretrained(policy)
    # Prompts of different lengths with images break the 3-D rotary index when padded right.
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=getattr(torch, dtype))
    freeze_part(model, freeze)
    checkpoint = _last_checkpoint(output)
    if checkpoint:
        restore_weights(model, checkpoint)
    trainer = GRPOTrainer(
        model=model,
        args=config,
        processing_class=processor,
        train_dataset=data,
        reward_funcs=[_logged(REWARDS[name], i == 0) for i, name in enumerate(rewards)],
    )
    trainer.remove_callback(PrinterCallback)  # the recorder's line replaces its dictionaries
    trainer.add_callback(Recorder(output, trainer, steps))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.accelerator.is_main_process:
        _save(output, trainer, processor, policy, card)


class Recorder(TrainerCallback):
    """Progress line, sampled completions of every step, and the mark of a complete checkpoint."""

    def __init__(self, output: Path, trainer: GRPOTrainer, steps: int):
        self.output, self.trainer, self.steps = output, trainer, steps
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = progress(
                None, desc="train", total=self.steps, unit="steps", done=state.global_step
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or "reward" not in (logs or {}):
            return
        self.bar.set_postfix(
            reward=f"{logs['reward']:.2f}",
            letter=f"{logs.get('rewards/letter_reward/mean', 0):.2f}",
            length=f"{logs.get('completions/mean_length', 0):.0f}",
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is None:
            return
        self.bar.update(1)
        logged = self.trainer._logs
        columns = {
            "mcq_id": list(logged["extra"]["mcq_id"]),
            "completion": [_text(c) for c in logged["completion"]],
            "format_reward": list(logged["rewards"].get("format_reward", [])),
            "letter_reward": list(logged["rewards"].get("letter_reward", [])),
            "advantage": list(logged["advantages"]),
        }
        rows = [
            {
                "step": state.global_step,
                **{k: v[i] if i < len(v) else None for k, v in columns.items()},
            }
            for i in range(len(columns["completion"]))
        ]
        path = shards.shard_path(self.output, "completions", state.global_step)
        shards.write(path, rows, schemas.completions())

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / COMPLETE).touch()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def verify(mcq: Path) -> None:
    """Check every question shard against the sha256 in the artifact's manifest.

    Raises StageError naming the first shard that differs or is missing.
    """
    try:
        manifest = json.loads((mcq / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise StageError(f"{mcq} has no readable manifest.json; re-run BuildMCQ") from error
    recorded = {n: f for n, f in manifest["files"].items() if n.startswith("mcq-")}
    for name, facts in recorded.items():
        path = mcq / name
        if not path.exists() or shards.sha256_file(path) != facts["sha256"]:
            raise StageError(
                f"{path} is not the shard that BuildMCQ froze; delete {mcq} and re-run BuildMCQ"
            )
    if not recorded:
        raise StageError(f"{mcq} holds no question shards; re-run BuildMCQ")


def freeze_part(model: torch.nn.Module, part: str) -> None:
    """Leave the vision tower with its projector, or the language model, untrained.

    Says how many parameters are trained. Raises StageError for an unknown part.
    """
    if part not in ("none", "vision", "language"):
        raise StageError(f"[Train] freeze must be none, vision or language; got {part!r}")
    for name, parameter in model.named_parameters():
        sees = any(word in name for word in VISION)
        parameter.requires_grad_(part == "none" or sees == (part == "language"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"train: {trained:,} of {total:,} parameters are trained (freeze = {part})")


def restore_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the model, every tensor or none.

    The trainer's own resume loads them by name and non-strictly, which silently leaves renamed
    tensors at their old values; from_pretrained knows the renaming.
    """
    saved = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict(), strict=True)


def _config(output: Path, given: dict[str, Any]) -> GRPOConfig:
    rewards, trl = given["rewards"], given["trl"]
    if unknown := sorted(set(rewards) - set(REWARDS)):
        raise StageError(f"[Train] rewards: unknown {unknown[0]!r}; known: {', '.join(REWARDS)}")
    if clash := sorted(set(trl) & OURS):
        raise StageError(f"[Train] trl: {clash[0]!r} is set by another key of [Train]")
    if unknown := sorted(set(trl) - set(GRPOConfig.__dataclass_fields__)):
        raise StageError(f"[Train] trl: TRL's GRPOConfig has no option {unknown[0]!r}")
    batch = given["questions_per_step"] * given["num_generations"]
    micro, world = given["micro_batch_size"], _world_size()
    if batch % (micro * world):
        raise StageError(
            f"[Train] questions_per_step x num_generations = {batch} completions must be a "
            f"multiple of micro_batch_size x processes = {micro} x {world}"
        )
    try:
        return GRPOConfig(
            output_dir=str(output / "checkpoints"),
            max_steps=given["steps"],
            learning_rate=given["learning_rate"],
            num_generations=given["num_generations"],
            max_completion_length=given["max_completion_length"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // (micro * world),
            reward_weights=list(rewards.values()),
            save_steps=given["save_steps"],
            seed=given["seed"],
            **{
                "report_to": "none",
                "logging_steps": 1,
                "shuffle_dataset": False,  # training_rows already orders the questions
                "remove_unused_columns": False,
                "disable_tqdm": True,
                "bf16": given["dtype"] == "bfloat16",
                "gradient_checkpointing": False,
                "save_total_limit": 2,
                **trl,
            },
        )
    except (ValueError, TypeError) as error:
        raise StageError(f"[Train] TRL refuses the settings: {error}") from error


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _last_checkpoint(output: Path) -> Path | None:
    found = [p for p in (output / "checkpoints").glob("checkpoint-*") if (p / COMPLETE).exists()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _logged(reward: Reward, with_ids: bool) -> Reward:
    """The reward; one of them also puts each completion's question id into the trainer's log."""
    if not with_ids:
        return reward

    @functools.wraps(reward)
    def rewarded(completions, mcq_id, log_extra, **columns):
        log_extra("mcq_id", list(mcq_id))
        return reward(completions, **columns)

    return rewarded


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _save(output: Path, trainer: GRPOTrainer, processor: Any, policy: Path, dataset: str) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    log = [
        {"step": entry["step"], **{ours: entry.get(key) for key, ours in LOGGED.items()}}
        for entry in trainer.state.log_history
        if "reward" in entry
    ]
    shards.write(output / "train_log.parquet", log, schemas.train_log())
    for name in ("checkpoints", CACHE):
        shutil.rmtree(output / name, ignore_errors=True)
    last = log[-max(1, len(log) // 5) :]
    first = log[: max(1, len(log) // 5)]
    (output / "README.md").write_text(
        f"# DiVE-k policy for {dataset}\n\nTrained by GRPO on {len(log)} steps of multiple-choice "
        f"questions about its own confusions, from the policy in `{policy}`.\n"
        f"Settings and inputs: `manifest.json`.\n",
        encoding="utf-8",
    )
    print(
        f"train: letter reward {_mean(first, 'letter_reward'):.3f} in the first steps, "
        f"{_mean(last, 'letter_reward'):.3f} in the last"
    )


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main(grpo)
