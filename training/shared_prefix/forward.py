"""The forward passes of shared-prefix training: packed rows, or padded rows with images once.

Both return `TokenScores`: log-probabilities and entropies of the completion tokens of some of TRL's
rows, and each token's place in TRL's tensor of (rows, completion tokens).
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
    """A batch in TRL's form: (rows, width) tokens, of which the last `keep` are the completion.

    `groups` has each row's group. `images` are the model's further inputs. They hold pixel values once
    a row or, with `per_group`, once a group in order of first appearance.
    """

    groups: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    keep: int
    images: Batch
    per_group: bool

    @cached_property
    def prompts(self) -> list[int]:
        """Each row's prompt length in tokens."""
        return self.attention_mask[:, : -self.keep].sum(1).tolist()

    @cached_property
    def completions(self) -> list[int]:
        """Each row's completion length in tokens."""
        return self.attention_mask[:, -self.keep :].sum(1).tolist()

    def ideal(self, subset: Sequence[int]) -> int:
        """The number of tokens of some rows, with each group's prompt once."""
        first = {self.groups[row]: self.prompts[row] for row in subset}
        return sum(first.values()) + sum(self.completions[row] for row in subset)

    def by_row(self, subset: Sequence[int], pixels: bool = True) -> Batch:
        """The model's further inputs for some rows, with each row's pixel values unless `pixels` is False."""
        count = self.images.get("num_images") or [0] * len(self.groups)
        drop = PIXELS if self.per_group or not pixels else ()
        own = select({k: v for k, v in self.images.items() if k not in drop}, count, subset)
        once = self.per_group and pixels
        return own | (self._grouped([self.groups[row] for row in subset]) if once else {})

    def by_group(self, subset: Sequence[int]) -> Batch:
        """The pixel values of some rows' groups, once a group."""
        return self._grouped(list(dict.fromkeys(self.groups[row] for row in subset)))

    def _grouped(self, groups: Sequence[int]) -> Batch:
        pixels = {key: self.images[key] for key in PIXELS if key in self.images}
        if not pixels:
            return {}
        members = packing.members(self.groups)
        places = {group: place for place, group in enumerate(members)}
        count = [self.images["num_images"][rows[0]] for rows in members.values()]
        return select(pixels, count, [places[group] for group in groups])


@dataclass(frozen=True)
class TokenScores:
    """Scores of single tokens (tokens,); `place` is their index in flattened (rows, completion tokens)."""

    logps: torch.Tensor
    entropies: torch.Tensor | None
    place: torch.Tensor
    tokens: int  # that went through the language model
    completion_tokens: int  # of these, those of completions


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of parallel training and of PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sharing(model: torch.nn.Module) -> tuple[str, str]:
    """What a group's completions can share in this model (prefix, vision or none), and why."""
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


def packed(model: torch.nn.Module, rows: Rows, subset: Sequence[int]) -> TokenScores:
    """Forward some rows as one packed row, with each group's prompt and image once (`packing.pack`)."""
    width, device = rows.input_ids.size(1), rows.input_ids.device
    pack = packing.pack(
        rows.groups, subset, rows.prompts, rows.completions, width - rows.keep, width, device
    )
    ids = rows.input_ids.flatten()
    labels = torch.where(pack.label < 0, -100, ids[pack.label.clamp(min=0)])
    outputs = model(
        input_ids=ids[pack.token][None],
        position_ids=_positions(base_of(model).base_model, rows, subset, pack),
        # transformers passes a dictionary on to the layers; else it would make a (tokens, tokens) mask.
        attention_mask={"full_attention": pack.layout(device)},
        shift_labels=labels[None],
        fused_lm_head=True,
        **rows.by_group(subset),
    )
    entropy = outputs.entropy
    return TokenScores(
        outputs.log_probs[0, pack.scored],
        None if entropy is None else entropy[0, pack.scored],
        pack.result,
        pack.length,
        pack.length - sum(span.prefix for span in pack.spans),
    )


def _positions(
    module: torch.nn.Module, rows: Rows, subset: Sequence[int], pack: packing.Packed
) -> torch.Tensor:
    """(3, 1, tokens): each token's rotary positions, as if its completion alone followed the prompt."""
    first: dict[int, int] = {}
    for row in subset:
        first.setdefault(rows.groups[row], row)
    own = list(first.values())
    prompt, mask = (x[own, : -rows.keep] for x in (rows.input_ids, rows.attention_mask))
    grid = rows.by_group(subset).get("image_grid_thw")
    if grid is None:
        positions = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    else:
        types = rows.images["mm_token_type_ids"][own, : -rows.keep]
        positions, _ = module.get_rope_index(
            prompt, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask
        )
    return (positions.flatten(1)[:, pack.place] + pack.ahead)[:, None]


def padded(
    stock: Callable[..., Any], rows: Rows, subset: Sequence[int], entropy: bool
) -> TokenScores:
    """Forward some rows by `stock`, TRL's own pass, without columns that are padding in all of them."""
    subset = list(subset)
    keep = max(rows.completions[row] for row in subset)
    start = rows.input_ids.size(1) - rows.keep - max(rows.prompts[row] for row in subset)
    stop = rows.input_ids.size(1) - rows.keep + keep
    images = rows.by_row(subset)
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in images:
            images[key] = images[key][:, start:stop]
    ids, mask = (x[subset, start:stop] for x in (rows.input_ids, rows.attention_mask))
    logps, entropies, _ = stock(ids, mask, keep, compute_entropy=entropy, **images)
    columns = torch.arange(keep, device=ids.device)
    first = torch.tensor(subset, device=ids.device) * rows.keep
    return TokenScores(
        logps.flatten(),
        entropies.flatten() if entropies is not None else None,
        (first[:, None] + columns).flatten(),
        ids.numel(),
        len(subset) * keep,
    )


def put(values: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`values` with `new` at flat indices `place`, differentiable in `new`."""
    return values.flatten().index_copy(0, place, new.to(values.dtype)).view_as(values)
