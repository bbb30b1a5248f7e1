"""The forward passes of shared-prefix training: packed rows, or padded rows with images once.

Both give the log-probabilities and entropies of the completion tokens of some of TRL's rows, and
tell where in TRL's tensor of (rows, completion tokens) each of them belongs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from training.shared_prefix import packing
from training.shared_prefix.attention import NAME
from training.shared_prefix.images_once import PIXELS, select

PREFIX_MODELS = ("qwen2_5_vl", "qwen2_vl")
Batch = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows as TRL keeps them: (rows, width) tokens, the last `keep` of them completion.

    `images` are the further inputs of the model: pixel values once a row, or with `per_group` once
    for each group in order of first appearance; `groups` names each row's group.
    """

    groups: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    keep: int
    images: Batch
    per_group: bool

    @cached_property
    def prompts(self) -> list[int]:
        return self.attention_mask[:, : -self.keep].sum(1).tolist()

    @cached_property
    def completions(self) -> list[int]:
        return self.attention_mask[:, -self.keep :].sum(1).tolist()

    def ideal(self, chosen: Sequence[int]) -> int:
        """The tokens of some rows, with the prompt once a group."""
        first = {self.groups[row]: self.prompts[row] for row in chosen}
        return sum(first.values()) + sum(self.completions[row] for row in chosen)

    def by_row(self, chosen: Sequence[int], pixels: bool = True) -> Batch:
        """The model's further inputs for some rows, each with images of its own or without."""
        count = self.images.get("num_images") or [0] * len(self.groups)
        drop = PIXELS if self.per_group or not pixels else ()
        own = select({k: v for k, v in self.images.items() if k not in drop}, count, chosen)
        once = self.per_group and pixels
        return own | (self._grouped([self.groups[row] for row in chosen]) if once else {})

    def by_group(self, chosen: Sequence[int]) -> Batch:
        """Pixel values for the groups of some rows, once a group."""
        return self._grouped(list(dict.fromkeys(self.groups[row] for row in chosen)))

    def _grouped(self, groups: Sequence[int]) -> Batch:
        pixels = {key: self.images[key] for key in PIXELS if key in self.images}
        if not pixels:
            return {}
        members = packing.members(self.groups)
        places = {group: place for place, group in enumerate(members)}
        count = [self.images["num_images"][rows[0]] for rows in members.values()]
        return select(pixels, count, [places[group] for group in groups])


@dataclass(frozen=True)
class Found:
    """Values of single tokens: `place` is their index in flattened (rows, completion tokens)."""

    logps: torch.Tensor
    entropies: torch.Tensor | None
    place: torch.Tensor
    tokens: int  # through the language model
    completion_tokens: int  # of these, those that are not prompt


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers for parallel training and adapters."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sharing(model: torch.nn.Module) -> tuple[str, str]:
    """prefix, vision or none: what a group's completions can share in this model, and why."""
    base = base_of(model)
    text, kind = base.config.get_text_config(), base.config.model_type
    attention = text._attn_implementation
    full = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if kind in PREFIX_MODELS and attention in ("sdpa", NAME) and full:
        return "prefix", kind
    if hasattr(base.base_model, "get_image_features"):
        if kind not in PREFIX_MODELS:
            return "vision", f"{kind}, for which there is no shared prefix"
        return "vision", f"{kind} with attention {attention}; a shared prefix needs sdpa, all full"
    return "none", f"{kind} has no get_image_features"


def packed(model: torch.nn.Module, rows: Rows, chosen: Sequence[int]) -> Found:
    """Forward some rows as one, each group's prompt and image once (`prefix_batches.pack`)."""
    width, device = rows.input_ids.size(1), rows.input_ids.device
    pack = packing.pack(
        rows.groups, chosen, rows.prompts, rows.completions, width - rows.keep, width, device
    )
    ids = rows.input_ids.flatten()
    labels = torch.where(pack.label < 0, -100, ids[pack.label.clamp(min=0)])
    outputs = model(
        input_ids=ids[pack.token][None],
        position_ids=_positions(base_of(model).base_model, rows, chosen, pack),
        # Handed on to the layers as it is, where a mask of all tokens by all would be made.
        attention_mask={"full_attention": pack.layout(device)},
        shift_labels=labels[None],
        fused_lm_head=True,
        **rows.by_group(chosen),
    )
    entropy = outputs.entropy
    return Found(
        outputs.log_probs[0, pack.scored],
        None if entropy is None else entropy[0, pack.scored],
        pack.result,
        pack.length,
        pack.length - sum(span.prefix for span in pack.spans),
    )


def _positions(
    module: torch.nn.Module, rows: Rows, chosen: Sequence[int], pack: packing.Packed
) -> torch.Tensor:
    """(3, 1, tokens): rotary positions of each token, as if its completion stood alone."""
    first: dict[int, int] = {}
    for row in chosen:
        first.setdefault(rows.groups[row], row)
    own = list(first.values())
    prompt, mask = (x[own, : -rows.keep] for x in (rows.input_ids, rows.attention_mask))
    grid = rows.by_group(chosen).get("image_grid_thw")
    if grid is None:
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    else:
        types = rows.images["mm_token_type_ids"][own, : -rows.keep]
        positions, _ = module.get_rope_index(
            prompt, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask
        )
    return (positions.flatten(1)[:, pack.place] + pack.ahead)[:, None]


def padded(stock: Callable[..., Any], rows: Rows, chosen: Sequence[int], entropy: bool) -> Found:
    """Forward some rows by `stock`, TRL's own pass, less the columns that are padding in all."""
    chosen = list(chosen)
    keep = max(rows.completions[row] for row in chosen)
    start = rows.input_ids.size(1) - rows.keep - max(rows.prompts[row] for row in chosen)
    stop = rows.input_ids.size(1) - rows.keep + keep
    images = rows.by_row(chosen)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in images:
            images[key] = images[key][:, start:stop]
    ids, mask = (x[chosen, start:stop] for x in (rows.input_ids, rows.attention_mask))
    logps, entropies, _ = stock(ids, mask, keep, compute_entropy=entropy, **images)
    columns = torch.arange(keep, device=ids.device)
    first = torch.tensor(chosen, device=ids.device) * rows.keep
    return Found(
        logps.flatten(),
        entropies.flatten() if entropies is not None else None,
        (first[:, None] + columns).flatten(),
        ids.numel(),
        len(chosen) * keep,
    )


def put(values: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`values` with `new` at flat indices `place`, differentiable in `new`."""
    return values.flatten().index_copy(0, place, new.to(values.dtype)).view_as(values)
