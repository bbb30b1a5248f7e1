"""What of a model is trained: its parts, LoRA on them, and the proof that the rest stayed as it was.

Every vision-language model of transformers has three parts: the vision tower, the projector from
its features to the language model's embeddings, and the language model with its output layer. Which
module is which is asked of the model itself (`get_encoder`, `get_decoder`), so a new family needs
no entry here.
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
    """Each parameter's name -> its part, for a model that is not wrapped yet."""
    modules = {id(module): name for name, module in model.named_modules()}
    encoder = model.get_encoder(modality="image")  # type: ignore[operator]
    decoder = model.get_decoder()  # type: ignore[operator]
    vision, language = modules[id(encoder)], modules[id(decoder)]
    if encoder is model or decoder is model or not vision or not language:
        raise StageError(
            f"{type(model).__name__} does not say which of its modules is the vision tower"
        )
    output = modules.get(id(model.get_output_embeddings()), "")  # type: ignore[operator]
    found = {}
    for name, _ in model.named_parameters():
        if _below(name, language) or (output and _below(name, output)):
            found[name] = "language"
        elif _below(name, vision):
            inside = name[len(vision) + 1 :].split(".")[0]
            found[name] = "projector" if MERGER in inside else "vision"
        else:
            found[name] = "projector"
    return found


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Leave some parts untrained."""
    frozen, belongs = set(parts), part_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs[name] not in frozen)


def lora_config(
    model: nn.Module, *, rank: int, alpha: float, dropout: float, targets: Iterable[str]
) -> Any:
    """PEFT's configuration of adapters on every linear layer of the chosen parts.

    The output layer has none.
    """
    from peft import LoraConfig

    chosen, belongs = set(targets), part_of(model)
    output = model.get_output_embeddings()  # type: ignore[operator]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and belongs[f"{name}.weight"] in chosen
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
        size = getattr(parameter, "ds_numel", parameter.numel())  # of all, where it is shared out
        counts[belongs[name]][0] += size * parameter.requires_grad
        counts[belongs[name]][1] += size
    trained, total = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    told = ", ".join(f"{part} {some:,} of {all_:,}" for part, (some, all_) in counts.items())
    return f"{trained:,} of {total:,} parameters are trained ({told})"


def hold_in_float32(model: nn.Module) -> None:
    """Hold what is trained in float32, before an optimizer is made of it.

    TRL casts the adapters of a quantised model to bfloat16, in which most of them lose an AdamW step
    at 1e-5: of bfloat16's eight digits a weight of 0.01 has none that small.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def frozen_hash(model: nn.Module) -> str:
    """Digest of every weight that is not trained; of this process's share where they are sharded."""
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
    """The base weights below LoRA adapters, kept so that merging cannot move them.

    Handing weights to vLLM merges the adapters into the base and takes them out again, which in
    bfloat16 does not come back to the same numbers. `restore` measures the drift and undoes it.
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
