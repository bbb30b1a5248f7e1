"""Attention for packed rows, in which several completions share one copy of their prompt.

A packed row holds one or more groups, one after the other, without padding:

    prefix 1 | branch 1.1 | branch 1.2 | ... | prefix 2 | branch 2.1 | ...

Each token attends causally to the prefix of its group and to its own branch, and to nothing else.
It sees the same tokens as if its completion alone followed the prompt.

`install` registers the function with transformers as the language model's attention, for the whole
run. A call whose attention mask is a `Layout` is computed here; every other call (generation, padded
rows) goes to SDPA. So nothing has to be switched between a forward pass and its recomputation under
gradient checkpointing.

On the CPU each group takes two SDPA calls: one for the prefix, one for all branches as a batch
against the prefix's expanded keys. On a GPU FlexAttention computes the whole row with a block mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

NAME = "shared_prefix"
FLEX_BLOCK = 128  # FlexAttention's rows are padded to a multiple of this many tokens


@dataclass(frozen=True)
class Span:
    """A group's place in the row: `prefix` tokens from `start` on, then branches of these lengths."""

    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prefix + sum(self.branches)


class Layout:
    """The groups of a packed row; passed to the attention function in place of an attention mask."""

    def __init__(self, spans: Sequence[Span], length: int, device: torch.device):
        self.spans = list(spans)
        self.length = length
        self.flex: BlockMask | None = None
        if uses_flex(device):
            self.flex = _block_mask(self.spans, length, device, compiled=True)
        else:
            self.grouped = [_Grouped(span, device) for span in self.spans]


def uses_flex(device: torch.device) -> bool:
    """Whether rows on this device use FlexAttention, whose backward pass needs CUDA."""
    return device.type == "cuda"


def padded_length(tokens: int, device: torch.device) -> int:
    """The length to which a row of `tokens` tokens is padded."""
    return -(-tokens // FLEX_BLOCK) * FLEX_BLOCK if uses_flex(device) else tokens


def install(model: PreTrainedModel) -> None:
    """Make `attention` the attention of `model`'s language model; before, it must be SDPA."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config.get_text_config()._attn_implementation = NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention output (batch, tokens, heads, head size).

    `query`, `key` and `value` are (batch, heads, tokens, head size).
    """
    if not isinstance(attention_mask, Layout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if attention_mask.flex is not None:
        mask = attention_mask.flex
        return flex_attention_forward(module, query, key, value, mask, scaling=scaling)
    if query.shape[1] != key.shape[1] and query.device.type != "cpu":
        # Off the CPU, SDPA uses its slowest kernel for a mask together with grouped heads.
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    out = [
        part
        for group in attention_mask.grouped
        for part in group.attend(query, key, value, scaling)
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


class _Grouped:
    """Computes one group's attention by SDPA."""

    def __init__(self, span: Span, device: torch.device):
        self.span = span
        count, longest = len(span.branches), max(span.branches, default=0)
        columns = torch.arange(longest, device=device)
        # (tokens of a branch, prefix + tokens). One mask serves branches of all lengths, because a
        # token never sees later ones, be they padding or not.
        causal = torch.zeros(longest, span.prefix + longest, device=device)
        causal[:, span.prefix :].masked_fill_(columns[None] > columns[:, None], float("-inf"))
        self.mask = causal
        self.rows: torch.Tensor | None = None
        if min(span.branches, default=0) != longest:
            lengths = torch.tensor(span.branches, device=device)
            starts = lengths.cumsum(0) - lengths
            inside = columns[None] < lengths[:, None]
            self.rows = (starts[:, None] + torch.where(inside, columns[None], 0)).flatten()
            self.kept = inside.flatten().nonzero().squeeze(1)
        self.shape = (count, longest)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> list[torch.Tensor]:
        """The group's outputs (1, heads, tokens, head size): its prefix's, then its branches'."""
        prefix, at, stop = self.span.prefix, self.span.start, self.span.stop
        query, key, value = (x[:, :, at:stop] for x in (query, key, value))
        same: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
        out = []
        if prefix:
            first, keys, values = (x[:, :, :prefix] for x in (query, key, value))
            out.append(F.scaled_dot_product_attention(first, keys, values, is_causal=True, **same))
        if self.shape[0]:
            keys, values = (
                torch.cat([x[:, :, :prefix].expand(self.shape[0], -1, -1, -1), self._split(x)], 2)
                for x in (key, value)
            )
            mask = self.mask.to(query.dtype)
            branches = F.scaled_dot_product_attention(
                self._split(query), keys, values, attn_mask=mask, **same
            )
            out.append(self._join(branches))
        return out

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, tokens of the group, size) to (branches, heads, longest branch, size)."""
        own = x[0, :, self.span.prefix :]
        if self.rows is not None:
            own = own.index_select(1, self.rows)
        return own.unflatten(1, self.shape).transpose(0, 1)

    def _join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_split`; drops the padding."""
        own = x.transpose(0, 1).flatten(1, 2)
        if self.rows is not None:
            own = own.index_select(1, self.kept)
        return own[None]


def _block_mask(
    spans: Sequence[Span], length: int, device: torch.device, compiled: bool
) -> BlockMask:
    """The row's block mask for FlexAttention; padding forms a group of its own."""
    group, branch = torch.full((length,), -1), torch.zeros(length, dtype=torch.long)
    for number, span in enumerate(spans):
        group[span.start : span.stop] = number
        branch[span.start + span.prefix : span.stop] = torch.repeat_interleave(
            torch.arange(1, len(span.branches) + 1), torch.tensor(span.branches)
        )
    group, branch = group.to(device), branch.to(device)

    def seen(_batch: Any, _head: Any, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        shared = (branch[column] == 0) | (branch[row] == branch[column])
        return (group[row] == group[column]) & (row >= column) & shared

    return create_block_mask(
        seen, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device, _compile=compiled
    )
