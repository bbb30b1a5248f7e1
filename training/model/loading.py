"""The model that is trained: loaded, in parts frozen, or with adapters."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tasks.runtime.errors import StageError
from training.model import sharding, trainable


def keeps_masters(dtype: str, lora_rank: int) -> bool:
    """Whether weights are held in float32 and computed in bfloat16.

    A small step is lost in a bfloat16 weight: of 50 AdamW steps at 1e-6 hardly one in fifty weights
    shows anything. So full fine-tuning holds float32; FSDP and ZeRO-3 do so by themselves.
    """
    return dtype == "bfloat16" and not lora_rank and not sharding.sharded_by_launcher()


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
    frozen = trainable.read_parts(freeze, "freeze")
    targets = trainable.read_parts(lora_targets, "lora_targets")
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
        trainable.freeze(model, frozen)
        return model, None
    if not torch.cuda.is_available():
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model, trainable.lora_config(
        model, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=targets
    )


def _contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """The last hidden state of each prompt, which generation cuts out of all of them, in one piece.

    On a CPU torch copies weights without a gradient once a row otherwise: gigabytes, and half a minute.
    """
    return (inputs[0].contiguous(),)


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
