"""Turns [Train] into TRL's configuration; every other option of TRL can be set in `trl`."""

import dataclasses
import logging
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from tasks.runtime.errors import StageError
from tasks.runtime.machine import check_gpu, gpus
from tasks.runtime.settings import Rule, mistyped
from training import round_rules
from training.loop import checkpoints
from training.model import sharding
from training.settings import TrainSettings
from training.trl_options import TRL_RULES


def grpo_config(
    output: Path, settings: TrainSettings, *, total_steps: int, seed: int, pairs: bool = False
) -> GRPOConfig:
    """GRPO's configuration; `total_steps` are those of all rounds. `pairs`: questions come in pairs.

    Raises StageError for options that TRL does not have, values that it refuses, batches that cannot
    be divided among processes, and checkpoints inside the uses of a generation batch.
    """
    _check_device(settings.trl)
    _check_options(GRPOConfig, settings.trl)
    round_rules.check_batches(settings, _world_size(), pairs)
    batch = settings.questions_per_step * settings.num_generations
    options = dict(settings.trl)
    if options.get("use_vllm") and not vllm_takes_weights():
        print(
            "train: without a GPU vLLM cannot take up weights; transformers generates", flush=True
        )
        options = {key: value for key, value in options.items() if "vllm" not in key}
    return _build(
        GRPOConfig,
        options,
        {
            **_shared(output, settings, batch, total_steps, seed),
            "num_generations": settings.num_generations,
            "max_completion_length": settings.max_completion_length,
            "reward_weights": list(settings.rewards.values()),
        },
        {
            "shuffle_dataset": False,  # the questions are in order already
            "gradient_checkpointing": False,
            "bf16": settings.dtype == "bfloat16",
            **of_reference(settings.dtype),
        },
    )


def sft_config(output: Path, settings: TrainSettings, *, total_steps: int, seed: int) -> SFTConfig:
    """The supervised baseline's configuration, without the options of `trl` that only GRPO has."""
    _check_device(settings.trl)
    known = set(SFTConfig.__dataclass_fields__)
    grpo = set(GRPOConfig.__dataclass_fields__)
    options = {key: v for key, v in settings.trl.items() if key in known or key not in grpo}
    _check_options(SFTConfig, options)
    examples = settings.questions_per_step
    each = max(1, examples // _world_size())
    most = min(settings.micro_batch_size, each)
    micro = next(size for size in range(most, 0, -1) if each % size == 0)
    return _build(
        SFTConfig,
        options,
        _shared(output, replace(settings, micro_batch_size=micro), examples, total_steps, seed),
        {
            "shuffle_dataset": False,
            "gradient_checkpointing": False,
            "bf16": settings.dtype == "bfloat16",
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "max_length": None,
        },
    )


def _shared(
    output: Path, settings: TrainSettings, batch: int, total_steps: int, seed: int
) -> dict[str, Any]:
    micro, world = settings.micro_batch_size, _world_size()
    round_rules.check_division(batch, micro, world)
    return {
        "output_dir": str(output / checkpoints.FOLDER),
        "max_steps": total_steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // (micro * world),
        "save_steps": settings.save_steps,
        "save_total_limit": None,  # the recorder deletes old ones, and counts only complete ones
        "seed": seed,
        "report_to": settings.report_to.split() or "none",
    }


def _build(
    kind: type[TrainingArguments],
    options: dict[str, Any],
    fixed: dict[str, Any],
    defaults: dict[str, Any],
) -> Any:
    quiet = {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log a loss of 0 where the loss is not finite
        "remove_unused_columns": False,
        "disable_tqdm": True,
        **sharding.reduced_each_time(),
    }
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(fixed["output_dir"]).parent / "runs"))
    try:
        config = kind(**fixed, **{**quiet, **defaults, **options})
    except (ValueError, TypeError) as error:
        raise StageError(f"[Train] TRL refuses the settings: {error}") from error
    if config.n_gpu > 1:  # without a launcher; TRL does not work with torch's DataParallel
        print(
            f"train: on the first of {config.n_gpu} GPUs; [Train] launcher puts a process on each, as "
            "in training/recipes/eight_gpus_fsdp2.cfg",
            flush=True,
        )
        config._n_gpu = 1
    return config


def _check_options(kind: type[TrainingArguments], options: dict[str, Any]) -> None:
    """Refuse options that are unknown, and values that are not of their fields' types."""
    if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(kind)}):
        raise StageError(f"[Train] trl: TRL's {kind.__name__} has no option {unknown[0]!r}")
    kinds = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        choices = tuple(field.metadata.get("choices") or ())
        if field.name not in options or field.name in TRL_RULES:
            continue  # not set, or checked with the settings
        value = options[field.name]
        problem = mistyped(value, kinds[field.name])
        if choices and value is not None:
            problem = problem or Rule(choices=choices).refusal(value)
        if problem:
            raise StageError(f"[Train] trl: {field.name} {problem}")


def _check_device(trl: dict[str, Any]) -> None:
    """Refuse to leave a GPU unused, unless `use_cpu` asks for it; then print a line."""
    if not trl.get("use_cpu"):
        check_gpu()
    elif gpus() and os.environ.get("RANK", "0") == "0":
        print(
            'train: on the CPU beside a GPU, since [Train] trl has "use_cpu": true; set it to false '
            "to use the GPU",
            flush=True,
        )


def vllm_takes_weights() -> bool:
    """Whether vLLM can load new weights here: its CPU build repacks weights, so that it cannot."""
    return torch.cuda.is_available()


@contextmanager
def of_reference_alone(options: dict[str, Any]) -> Iterator[None]:
    """Suppress TRL's warning that it ignores `model_init_kwargs`, unless the user set them.

    We set them for the reference model, which TRL loads. The policy is already loaded.
    """
    ours = "model_init_kwargs" not in options
    log = logging.getLogger("trl.trainer.grpo_trainer")

    def wanted(record: logging.LogRecord) -> bool:
        return not (ours and "model_init_kwargs" in record.getMessage())

    log.addFilter(wanted)
    try:
        yield
    finally:
        log.removeFilter(wanted)


def of_reference(dtype: str) -> dict[str, Any]:
    """TRL's options for loading the reference model in `dtype`; TRL's default is float32."""
    return {} if dtype == "float32" else {"model_init_kwargs": {"dtype": dtype}}


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
