"""The model that is trained: loaded, in parts frozen or with adapters, and found to fit in memory."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from tasks import engine
from tasks.run import StageError
from training import memory, parts


def load_processor(policy: Path | str, **options: Any) -> Any:
    """The policy's processor, padding on the left.

    Prompts of different lengths with images break the 3-D rotary index when padded on the right.
    """
    processor = engine.load_processor(policy, **options)
    processor.tokenizer.padding_side = "left"
    return processor


def sized_processor(model: str, min_pixels: int, max_pixels: int) -> Any:
    """The processor of a model, scaling images to an area between two bounds in pixels.

    Says so where the model has an image size of its own and takes up neither.
    """
    processor = load_processor(model, min_pixels=min_pixels, max_pixels=max_pixels)
    size = getattr(processor.image_processor, "size", None) or {}
    if (size.get("shortest_edge"), size.get("longest_edge")) != (min_pixels, max_pixels):
        print(
            f"base_policy: {model} has an image size of its own; [BasePolicy] min_pixels and "
            "max_pixels do nothing",
            flush=True,
        )
    return processor


def end_tokens(policy: Path) -> list[int]:
    """Every token that ends the policy's answers, by its generation configuration; may be none."""
    try:
        ends = GenerationConfig.from_pretrained(policy).eos_token_id
    except OSError:  # the folder has none
        return []
    return [ends] if isinstance(ends, int) else list(ends or [])


def keeps_masters(dtype: str, lora_rank: int) -> bool:
    """Whether weights are held in float32 and computed in bfloat16.

    A small step is lost in a bfloat16 weight: of 50 AdamW steps at 1e-6 hardly one in fifty weights
    shows anything. So full fine-tuning holds float32; FSDP and ZeRO-3 do so by themselves.
    """
    return dtype == "bfloat16" and not lora_rank and not sharded_by_launcher()


def load_model(
    base: Path,
    *,
    dtype: str,
    quantize: str,
    freeze: str,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float,
    lora_targets: str,
) -> tuple[torch.nn.Module, Any]:
    """The base model with what is not trained frozen, and PEFT's configuration or None.

    Raises StageError for settings that exclude each other.
    """
    if dtype not in ("float32", "bfloat16"):
        raise StageError(f"[Train] dtype must be float32 or bfloat16; got {dtype!r}")
    frozen = parts.read_parts(freeze, "freeze")
    targets = parts.read_parts(lora_targets, "lora_targets")
    if lora_rank and frozen:
        raise StageError(
            "[Train] freeze is for training all weights; with lora_rank set, lora_targets says which "
            "parts get adapters, and everything else is frozen"
        )
    held = "float32" if keeps_masters(dtype, lora_rank) else dtype
    options: dict[str, Any] = {"dtype": getattr(torch, held)}
    if quantize != "none":
        options["quantization_config"] = _quantization(quantize, lora_rank, dtype)
    model = AutoModelForImageTextToText.from_pretrained(base, use_safetensors=True, **options)
    if not lora_rank:
        parts.freeze(model, frozen)
        return model, None
    return model, parts.lora_config(
        model, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=targets
    )


def check_memory(
    base: Path, processor: Any, rows: list[dict[str, Any]], config: Any, given: dict
) -> None:
    """Estimate what training takes from the longest of some real prompts, and refuse what can't fit."""
    sharded = any(getattr(config, key, None) for key in ("fsdp", "deepspeed"))
    generations = given.get("num_generations", 1)
    needed = memory.estimate(
        base,
        dtype=given["dtype"],
        frozen=parts.read_parts(given["freeze"], "freeze"),
        lora_rank=given["lora_rank"],
        lora_targets=parts.read_parts(given["lora_targets"], "lora_targets"),
        quantized=given["quantize"] != "none",
        reference=getattr(config, "beta", 0.0) != 0.0,
        optimizer=str(getattr(config.optim, "value", config.optim)),
        checkpointing=config.gradient_checkpointing,
        sequences=config.per_device_train_batch_size,
        prompt_tokens=memory.longest_prompt(processor, rows),
        completion_tokens=given["max_completion_length"] if generations > 1 else 64,
        shards=config.world_size if sharded or sharded_by_launcher() else 1,
    )
    colocated = getattr(config, "use_vllm", False) and config.vllm_mode == "colocate"
    memory.check(
        needed,
        memory.available_memory(),
        config.vllm_gpu_memory_utilization if colocated else 0.0,
    )


def sharded_by_launcher() -> bool:
    """Whether accelerate launched this process to share its weights with others."""
    return any(
        os.environ.get(name, "false").lower() in ("1", "true")
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def _quantization(quantize: str, lora_rank: int, dtype: str) -> Any:
    if quantize != "nf4":
        raise StageError(f"[Train] quantize must be none or nf4; got {quantize!r}")
    if not lora_rank:
        raise StageError("[Train] quantize = nf4 needs adapters to train: set lora_rank above 0")
    if not torch.cuda.is_available():
        raise StageError("[Train] quantize = nf4 needs a GPU; set it to none")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise StageError(
            "[Train] quantize = nf4 needs bitsandbytes: pip install bitsandbytes"
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
