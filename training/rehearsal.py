"""Rehearses a training without its weights: the libraries check the settings, and one step runs.

    python -m training.rehearsal recipe.json

The step uses the model's real widths and vocabulary, with few layers and random weights. It trains on
a picture of the largest size, with a question of the real length, and with the real options of
`[Train] trl`, gradient checkpointing, adapters, the parity check, and a checkpoint. Only the depth, the
number of completions and their length are smaller. `python -m pipeline rehearse` runs it.
"""

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PrinterCallback,
)

from tasks.engines import vllm
from tasks.engines.base import quiet_start
from tasks.engines.settings import EngineSettings
from tasks.runtime.command import main
from tasks.runtime.errors import StageError, first_line
from tasks.runtime.memory import own_peak
from tasks.runtime.protocol import save_stats
from training.loop.sampling import trainer_of
from training.loop.trl_settings import grpo_config
from training.model import loading, processors, tiny_policy
from training.model.shapes import config_of
from training.settings import TrainSettings
from training.shared_prefix.forward import PREFIX_MODELS

LAYERS, VISION_LAYERS = 1, 2
COMPLETIONS, TOKENS = 2, 16  # of one question, and of each completion


def rehearsal(
    output: Path,
    *,
    model: str,
    train: TrainSettings,
    engine: EngineSettings,
    question: str,
    min_pixels: int,
    max_pixels: int,
    processes: int,
) -> None:
    """Rehearse the training of `model`, and write the results into `stats.json`.

    `model` is a folder or hub id. Its config is read, and its processor if it is on this machine.
    `processes` is how many the launcher starts. The stats hold `points`: (what, ready or mend, a
    sentence).
    """
    points: list[tuple[str, str, str]] = []
    policy = output / "cache" / "policy"

    def point(what: str, work: Callable[[], str]) -> bool:
        """Run `work` and add its result, or its error as a point to mend; returns whether it worked."""
        try:
            points.append((what, "ready", work()))
        except (StageError, ValueError, TypeError, RuntimeError, OSError, MemoryError) as error:
            points.append((what, "mend", first_line(error)))
        print(f"rehearsal: {what}: {points[-1][2]}", flush=True)
        return points[-1][1] == "ready"

    point("trainer", lambda: check_config(output, train, processes))
    has_policy = point(
        "shape", lambda: describe(random_policy(policy, model, min_pixels, max_pixels), model)
    )
    if has_policy:
        point("engine", lambda: check_engine(policy, engine))
        point("step", lambda: one_step(output, policy, train, question, max_pixels))
    save_stats(output, {"points": points, "peak_memory_mb": round(own_peak())})


def check_config(output: Path, train: TrainSettings, processes: int) -> str:
    """Build TRL's configuration as in a run of `processes` processes; returns it in words."""
    own = {} if torch.cuda.is_available() else {"use_cpu": True}
    kept = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        settings = replace(train, trl={**train.trl, **own})
        config = grpo_config(output, settings, total_steps=train.steps, seed=0)
    finally:
        os.environ.pop("WORLD_SIZE")
        if kept is not None:
            os.environ["WORLD_SIZE"] = kept
    return (
        f"{processes} x {config.per_device_train_batch_size} completions, "
        f"{config.gradient_accumulation_steps} times a step; loss {config.loss_type}, beta {config.beta:g}"
    )


def check_engine(policy: Path, engine: EngineSettings) -> str:
    """Let vLLM check its arguments against the model's config, without loading it; returns them in words."""
    if engine.backend not in ("vllm", "ray"):
        return f"backend {engine.backend}, which is not vLLM's"
    from vllm import EngineArgs

    with quiet_start():
        arguments = vllm.options(policy, engine, on_gpu=vllm.on_gpu())
        try:
            config = EngineArgs(**arguments).create_engine_config()
        except ValueError as error:  # pydantic's: the third line says what is wrong
            lines = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
            raise StageError(
                f"vLLM refuses [engine]: {(lines or [first_line(error)])[0]}"
            ) from error
    return (
        f"vLLM takes [engine]: {config.model_config.dtype}, {config.model_config.max_model_len:,} tokens "
        f"at most, {arguments['max_num_seqs']} answers at work"
    )


def one_step(
    output: Path, policy: Path, train: TrainSettings, question: str, max_pixels: int
) -> str:
    """Take one optimiser step on one question about a picture of `max_pixels`, and save a checkpoint.

    Returns its time and tokens in words.
    """
    settings = small(train)
    model, adapters = loading.load_model(policy, settings)
    trainer = trainer_of(
        settings,
        truth_rollout=False,
        model=model,
        args=grpo_config(output, settings, total_steps=1, seed=0),
        processing_class=processors.load_processor(policy),
        train_dataset=Dataset.from_list(questions(question, max_pixels)),
        reward_funcs=uneven,
        peft_config=adapters,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    counters = getattr(trainer, "counters", None)
    tokens = (
        ""
        if counters is None
        else (
            f", {counters.lm_tokens:,} tokens through the language model where TRL takes "
            f"{counters.lm_tokens_stock:,}"
        )
    )
    return f"a step of {COMPLETIONS} completions took {seconds:.0f} s{tokens}"


def describe(policy: Path, model: str) -> str:
    """The random policy in words: the layers and weights it has in place of `model`'s."""
    size = sum(path.stat().st_size for path in policy.glob("*.safetensors")) / 1e9
    return (
        f"{model} with {LAYERS} of its language layers and {VISION_LAYERS} of its vision layers, random "
        f"weights, {size:.1f} GB"
    )


def random_policy(folder: Path, model: str, min_pixels: int, max_pixels: int) -> Path:
    """Write a policy with the model's widths, few layers, and random weights in bfloat16.

    It has the model's own processor if that is on this machine. Otherwise the Qwen2.5-VL family gets
    the tiny policy's, which makes equally many image tokens. Raises StageError for other families.
    """
    config = shallow(config_of(model))
    try:
        processor = AutoProcessor.from_pretrained(
            model, local_files_only=True, min_pixels=min_pixels, max_pixels=max_pixels
        )
    except (OSError, ValueError) as error:
        if config.model_type not in PREFIX_MODELS:
            raise StageError(
                f"the processor of {model} is not on this machine, and a {config.model_type} cannot be "
                "asked without it; load it once from the hub"
            ) from error
        processor = tiny_policy.processor(min_pixels=min_pixels, max_pixels=max_pixels)
        name_tokens(config, processor.tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tiny_policy.save(network, processor, folder)
    return folder


def shallow(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with LAYERS layers in the language model and VISION_LAYERS in the vision tower."""
    few = copy.deepcopy(config)
    text, vision = few.get_text_config(), few.vision_config
    text.num_hidden_layers = LAYERS
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:LAYERS])
    depth = "depth" if hasattr(vision, "depth") else "num_hidden_layers"
    setattr(vision, depth, VISION_LAYERS)
    if getattr(vision, "fullatt_block_indexes", None):
        vision.fullatt_block_indexes = [VISION_LAYERS - 1]
    return few


def name_tokens(config: PretrainedConfig, tokenizer: Any) -> None:
    """Set the special tokens' ids in the configuration to those of another tokenizer."""
    marks = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    for key, mark in marks.items():
        setattr(config, key, tokenizer.convert_tokens_to_ids(mark))
    text = config.get_text_config()
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    text.bos_token_id = None


def small(train: TrainSettings) -> TrainSettings:
    """The settings of the rehearsal: one step on one question, two short completions, one process."""
    trl = {key: v for key, v in train.trl.items() if not key.startswith(("vllm", "use_vllm"))}
    trl = {key: v for key, v in trl.items() if key not in ("steps_per_generation", "fsdp")}
    if not torch.cuda.is_available():
        trl["use_cpu"] = True
    return replace(
        train,
        trl=trl,
        steps=1,
        save_steps=1,
        watch_every=0,
        keep_policy="last",
        dynamic_sampling=0,
        questions_per_step=1,
        num_generations=COMPLETIONS,
        micro_batch_size=COMPLETIONS,
        max_completion_length=TOKENS,
        rewards={"training.rehearsal:uneven": 1.0},
        report_to="",
        quantize=train.quantize if torch.cuda.is_available() else "none",
    )


def questions(text: str, pixels: int) -> list[dict[str, Any]]:
    """One training row: the question `text` about a picture of noise with `pixels` pixels."""
    height = max(1, round((pixels * 3 / 4) ** 0.5))
    noise = np.random.default_rng(0).integers(0, 256, (height, pixels // height, 3), np.uint8)
    return [{"prompt": [{"role": "user", "content": text}], "image": Image.fromarray(noise)}]


def uneven(completions: list[Any], **_: Any) -> list[float]:
    """A reward that varies within a group, so that there is a gradient."""
    return [float(place % 2) for place, _ in enumerate(completions)]


if __name__ == "__main__":
    main(rehearsal)
