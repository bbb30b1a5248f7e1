"""A model's sizes, on which memory and disk depend: counts and widths, without its weights."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from tasks.engines.shared_prompts.cache import unknown_kinds
from training.model import sharding, trainable
from training.model.shapes import config_of


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers: their number and their widths."""

    layers: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class Sizes:
    """A model in numbers.

    Three fields have one number for each part (`training.settings.PARTS`). `parameters` counts all
    weights, and `adapted` those of linear layers that can have adapters. `edges` sums these layers'
    input and output widths, so that adapters of rank r have r times as many weights. `cache` is how
    many numbers the key-value cache keeps of a token, over all layers. `branches` says whether completions
    can attend to one copy of their prompt (`tasks.engines.shared_prompts`). `tied` says whether the output
    layer is the embedding. `merged` patches of the vision tower make one image token.
    """

    kind: str  # transformers' model_type
    parameters: dict[str, int]
    adapted: dict[str, int]
    edges: dict[str, int]
    language: Tower
    vision: Tower
    vocabulary: int
    tied: bool
    cache: int
    merged: int
    branches: bool

    @property
    def count(self) -> int:
        """The number of all weights; tied ones count once."""
        return sum(self.parameters.values())

    def trained(
        self, frozen: tuple[str, ...], lora_rank: int, lora_targets: tuple[str, ...]
    ) -> int:
        """The number of trained weights: those of adapters, or of all parts but the frozen ones."""
        if lora_rank:
            return lora_rank * sum(self.edges[part] for part in lora_targets)
        return sum(count for part, count in self.parameters.items() if part not in frozen)


@lru_cache(maxsize=8)
def sizes_of(model: str | Path) -> Sizes:
    """The sizes of a model, given as a folder or hub id; only its config is read.

    Raises StageError where its config is not known.
    """
    config = config_of(model)
    with torch.device("meta"), sharding.outside_deepspeed():
        network = AutoModelForImageTextToText.from_config(config)
    belongs = trainable.part_of(network)
    parameters, adapted, edges = ({part: 0 for part in trainable.PARTS} for _ in range(3))
    for name, parameter in network.named_parameters():
        parameters[belongs[name]] += parameter.numel()
    output = network.get_output_embeddings()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not output:
            part = belongs[f"{name}.weight"]
            adapted[part] += module.weight.numel()
            edges[part] += module.in_features + module.out_features
    text, vision = config.get_text_config(), config.vision_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Sizes(
        config.model_type,
        parameters,
        adapted,
        edges,
        _tower(text),
        _tower(vision),
        text.vocab_size,
        output.weight is network.get_input_embeddings().weight,
        text.num_hidden_layers * 2 * heads * size,
        _merged(config, vision),
        hasattr(network.base_model, "get_image_features")
        and not unknown_kinds(DynamicCache(config=config))
        and getattr(text, "attn_logit_softcapping", None) is None,
    )


def _tower(config: Any) -> Tower:
    def first(*names: str) -> int:
        return next((int(v) for n in names if (v := getattr(config, n, None)) is not None), 0)

    hidden = first("hidden_size", "embed_dim")
    inner = first("intermediate_size", "ffn_dim") or 4 * hidden
    return Tower(first("num_hidden_layers", "depth"), hidden, inner)


def _merged(config: Any, vision: Any) -> int:
    """Patches that make one image token; each family's config has its own key for it."""
    if side := getattr(vision, "spatial_merge_size", None):
        return int(side) ** 2
    if scale := getattr(config, "scale_factor", None):
        return int(scale) ** 2
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return int((vision.image_size // vision.patch_size) ** 2 // tokens)
    return 1
