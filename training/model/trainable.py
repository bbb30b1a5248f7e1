"""Trainable modules: a model's parts, freezing, LoRA, and a hash of the frozen weights.

Every vision-language model of transformers has three parts: the vision tower, the projector from
its features to the language model's embeddings, and the language model with its output layer. The
model itself names them (`get_encoder`, `get_decoder`), so a new family needs no entry here.
"""

from collections.abc import Iterable
from typing import Any

import torch
import xxhash
from torch import nn

from tasks.runtime.errors import StageError
from training.settings import PARTS

MERGER = "merger"  # Qwen's projectors are the one kind that lies inside the vision tower


def part_of(model: nn.Module) -> dict[str, str]:
    """Each parameter's name -> its part (vision, projector or language), for a model without wrappers.

    Raises StageError where the model does not name its vision tower.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    encoder = model.get_encoder(modality="image")  # type: ignore[operator]
    decoder = model.get_decoder()  # type: ignore[operator]
    vision, language = modules[id(encoder)], modules[id(decoder)]
    if encoder is model or decoder is model or not vision or not language:
        raise StageError(
            f"{type(model).__name__} does not say which of its modules is the vision tower"
        )
    output = modules.get(id(model.get_output_embeddings()), "")  # type: ignore[operator]
    parts = {}
    for name, _ in model.named_parameters():
        if _below(name, language) or (output and _below(name, output)):
            parts[name] = "language"
        elif _below(name, vision):
            inside = name[len(vision) + 1 :].split(".")[0]
            parts[name] = "projector" if MERGER in inside else "vision"
        else:
            parts[name] = "projector"
    return parts


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze the parameters of `parts`, and make all others trainable."""
    frozen, belongs = set(parts), part_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs[name] not in frozen)


def lora_config(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Iterable[str]
) -> Any:
    """PEFT's configuration of LoRA on every linear layer of the parts `targets`.

    The output layer gets no adapter.
    """
    from peft import LoraConfig

    wanted, belongs = set(targets), part_of(model)
    output = model.get_output_embeddings()  # type: ignore[operator]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and belongs[f"{name}.weight"] in wanted
    ]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )


def describe(model: nn.Module) -> str:
    """How many parameters are trained, part by part, as one line."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    belongs = part_of(inner)
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in inner.named_parameters():
        size = getattr(
            parameter, "ds_numel", parameter.numel()
        )  # the whole size, where it is sharded
        counts[belongs[name]][0] += size * parameter.requires_grad
        counts[belongs[name]][1] += size
    trained, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    by_part = ", ".join(f"{part} {some:,} of {all_:,}" for part, (some, all_) in counts.items())
    return f"{trained:,} of {total:,} parameters are trained ({by_part})"


def hold_in_float32(model: nn.Module) -> None:
    """Convert the trained weights to float32; call it before the optimizer is made.

    TRL casts the adapters of a quantised model to bfloat16. That has 8 significant bits, so an AdamW
    step of 1e-5 is lost in a weight of 0.01.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def frozen_hash(model: nn.Module) -> str:
    """Hash of all frozen weights; where they are sharded, of this process's shards."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        tensor = getattr(parameter, "ds_tensor", parameter).detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


class BaseKeeper:
    """Copies of the base weights below LoRA adapters, which undo the drift of merging.

    Every weight transfer to vLLM merges the adapters into the base and subtracts them again. In
    bfloat16 this does not give back the same numbers. `restore` measures the drift and undoes it.
    """

    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if hasattr(m, "base_layer")]
        self.kept = [layer.base_layer.weight.detach().to("cpu", copy=True) for layer in self.layers]

    @torch.no_grad()
    def restore(self) -> float:
        """Put the base weights back; returns the drift undone, mean |change| over mean |weight|."""
        moved = total = 0.0
        for layer, kept in zip(self.layers, self.kept, strict=True):
            weight = layer.base_layer.weight
            before = kept.to(weight.device)
            moved += float((weight.float() - before.float()).abs().sum())
            total += float(before.float().abs().sum())
            weight.copy_(before)
        return moved / total if total else 0.0


def _below(name: str, module: str) -> bool:
    return name.startswith(module + ".")
