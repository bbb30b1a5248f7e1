"""The model that is trained: loaded, in parts frozen or with adapters, and found to fit in memory."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from tasks import engine
from tasks.run import StageError
from training import disk, memory, parts, vllm_memory
from training.sizes import sizes_of


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
    base: Path, processor: Any, rows: list[dict[str, Any]], config: Any, given: dict, output: Path
) -> None:
    """Say what training takes of memory and of the disk of `output`, and refuse what can't fit."""
    prompt = memory.longest_prompt(processor, rows)
    needed = estimate(base, prompt, config, given)
    available, share = memory.available_memory(), 0.0
    if getattr(config, "use_vllm", False) and config.vllm_mode == "colocate":
        total = memory.total_memory()
        longest = config.vllm_max_model_length or prompt[0] + given["max_completion_length"]
        engine = vllm_memory.vllm_needs(
            base,
            max_length=longest,
            sequences=generated_at_once(config),
            dtype=given["dtype"],
            tensor_parallel=config.vllm_tensor_parallel_size,
        )
        key = "vllm_gpu_memory_utilization"
        share = vllm_memory.check_vllm(engine, config.vllm_gpu_memory_utilization, total, key=key)
    memory.check(needed, available, share)
    disk.check(disk_needs(base, config, given), output)


def estimate(
    base: Path, prompt: tuple[int, int], config: Any, given: dict[str, Any]
) -> memory.Estimate:
    """What a process of this training takes, for prompts of so many tokens, and so many of the image."""
    generates = hasattr(config, "steps_per_generation")
    shards, sharding, offloaded = sharding_of(config)
    return memory.estimate(
        base,
        dtype=given["dtype"],
        frozen=parts.read_parts(given["freeze"], "freeze"),
        lora_rank=given["lora_rank"],
        lora_targets=parts.read_parts(given["lora_targets"], "lora_targets"),
        quantized=given["quantize"] != "none",
        reference=getattr(config, "beta", 0.0) != 0.0,
        optimizer=optimizer_name(config),
        checkpointing=config.gradient_checkpointing,
        sequences=config.per_device_train_batch_size,
        prompt_tokens=prompt[0],
        completion_tokens=given["max_completion_length"] if generates else 64,
        image_tokens=prompt[1],
        group=given["num_generations"] if generates else 1,
        shared=bool(given.get("shared_prefix")) and generates,
        pass_limit=given.get("tokens_per_micro_batch", 0),
        generated=generated_at_once(config) if generates and not config.use_vllm else 0,
        shards=shards,
        sharding=sharding,
        offloaded=offloaded,
        cuda=torch.cuda.is_available(),
    )


def disk_needs(base: Path, config: Any, given: dict[str, Any]) -> disk.DiskNeeds:
    """What a round of this training writes."""
    sizes = sizes_of(base)
    targets = parts.read_parts(given["lora_targets"], "lora_targets")
    frozen = parts.read_parts(given["freeze"], "freeze")
    keys = ("dtype", "steps", "save_steps", "watch_every", "keep_checkpoints", "carry_over")
    return disk.disk_needs(
        count=sizes.count,
        trained=sizes.trained(frozen, given["lora_rank"], targets),
        optimizer_bytes=memory.optimizer_bytes(optimizer_name(config)),
        lora=bool(given["lora_rank"]),
        sharding=sharding_of(config)[1],
        **{key: given[key] for key in keys},
    )


def optimizer_name(config: Any) -> str:
    """TRL's name of the optimizer."""
    return str(getattr(config.optim, "value", config.optim))


def generated_at_once(config: Any) -> int:
    """Completions that one process asks for at a time: those of all turns of a batch."""
    return int(config.per_device_train_batch_size * config.steps_per_generation)


def sharding_of(config: Any) -> tuple[int, str, bool]:
    """Over how many processes weights are spread, by what, and whether states are in main memory."""
    deepspeed = config.deepspeed or _told("ACCELERATE_USE_DEEPSPEED")
    if not (deepspeed or getattr(config, "fsdp", None) or _told("ACCELERATE_USE_FSDP")):
        return 1, "", False
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    return config.world_size, "deepspeed" if deepspeed else "fsdp", offload == "cpu"


def sharded_by_launcher() -> bool:
    """Whether accelerate launched this process to share its weights with others."""
    return _told("ACCELERATE_USE_FSDP") or _told("ACCELERATE_USE_DEEPSPEED")


def _told(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


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
