"""Loads the model that is trained, and freezes parts of it or configures its adapters."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tasks.runtime.errors import StageError
from training.model import sharding, trainable
from training.settings import TrainSettings


def keeps_masters(settings: TrainSettings) -> bool:
    """Whether the model keeps float32 master weights and computes in bfloat16.

    Rounding loses small steps in bfloat16 weights: after 50 AdamW steps at 1e-6 hardly one weight in
    fifty has changed. So full fine-tuning keeps float32. FSDP and ZeRO-3 do so by themselves.
    """
    full = settings.dtype == "bfloat16" and not settings.lora_rank
    return full and not sharding.sharded_by_launcher()


def load_model(base: Path, settings: TrainSettings) -> tuple[torch.nn.Module, Any]:
    """The model in the folder `base`, with its frozen parts, and PEFT's configuration or None.

    Raises StageError where its weights cannot be quantised here.
    """
    precision = "float32" if keeps_masters(settings) else settings.dtype
    options: dict[str, Any] = {"dtype": getattr(torch, precision)}
    if settings.quantized:
        options["quantization_config"] = _quantization(settings)
    model = AutoModelForImageTextToText.from_pretrained(base, use_safetensors=True, **options)
    if not settings.lora_rank:
        trainable.freeze(model, settings.frozen)
        return model, None
    if not torch.cuda.is_available():
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return model, trainable.lora_config(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.adapted,
    )


def _contiguous(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Make the head's input contiguous: generation passes a slice, each prompt's last hidden state.

    On a CPU torch otherwise copies weights without a gradient once a row: gigabytes and half a minute.
    """
    return (inputs[0].contiguous(),)


def _quantization(settings: TrainSettings) -> Any:
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
        bnb_4bit_quant_type=settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
