"""Keys and values of prompts, each stored once, and of completions that branch off from them.

A `SharedLayer` takes the place of a layer of transformers' dynamic cache after the prompts' pass. It
returns itself in place of keys and values, which models hand to their attention function unread. That
is `attend` while completions are generated.

All completions are in step: each adds one token at a time, in the same column. So a sliding window is
the same slice for all, and only the padding in front of prompts needs a mask.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "shared_prompts"  # of the attention, in transformers' registry
ROOM = 32  # tokens by which the room for completions first grows


class NotShared(Exception):
    """This model or these options need transformers' own loop. The message says why."""


class Branches:
    """Which prompt each row of the batch follows.

    `prompt` (rows,) numbers the prompts and never falls; `count` is their number. For products with
    a prompt's keys, rows are arranged in a grid (prompts, most rows of a prompt).
    """

    def __init__(self, prompt: "torch.Tensor", count: int):
        self.prompt, self.count = prompt, count
        rows = prompt.bincount(minlength=count)
        self.most = int(rows.max())
        self._place = self._row = None  # of each row in the grid; at each place, a row
        if int(rows.min()) != self.most:
            order = prompt.new_ones(len(prompt)).cumsum(0) - 1
            self._place = prompt * self.most + order - (rows.cumsum(0) - rows)[prompt]
            self._row = prompt.new_zeros(count * self.most)
            self._row[self._place] = order

    def keep(self, rows: "torch.Tensor", cache: Any) -> None:
        """Drop all other rows of the batch and of the cache, and prompts that have none left."""
        prompts, prompt = self.prompt[rows].unique(return_inverse=True)
        fewer = prompts if len(prompts) < self.count else None
        self.__init__(prompt, len(prompts))  # type: ignore[misc]
        for layer in cache.layers:
            layer.keep(rows, fewer)

    def grid(self, x: "torch.Tensor") -> "torch.Tensor":
        """(rows, heads, queries, size) to (prompts, heads, most rows x queries, size)."""
        if self._row is not None:
            x = x.index_select(0, self._row)
        x = x.reshape(self.count, self.most, *x.shape[1:])
        return x.transpose(1, 2).flatten(2, 3)

    def flat(self, x: "torch.Tensor") -> "torch.Tensor":
        """The inverse of `grid`."""
        x = x.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return x if self._place is None else x.index_select(0, self._place)


class SharedLayer:
    """One layer's keys and values: (prompts, heads, tokens, size), and those of rows beside them.

    `mask` (prompts, 1, 1, tokens) is added to scores of prompt tokens; None without padding.
    """

    is_compileable = is_sliding = is_croppable = supports_early_init = False
    is_initialized = True

    def __init__(self, layer: Any, branches: Branches, mask: "torch.Tensor | None"):
        self.prefix, self.prefix_values = layer.keys, layer.values
        self.branches, self.start = branches, layer.get_seq_length()
        self.window: int | None = getattr(layer, "sliding_window", None)
        self.mask = None if mask is None else mask[..., -self.prefix.size(2) :]
        self.length = self.room = 0  # columns of completions: in use, and allocated
        self.keys = self.values = self.prefix[:0]

    def get_seq_length(self) -> int:
        return self.start + self.length

    def update(
        self, keys: "torch.Tensor", values: "torch.Tensor", *_: Any, **__: Any
    ) -> tuple["SharedLayer", "SharedLayer"]:
        """Append the keys and values of one token a row (rows, heads, 1, size)."""
        if keys.size(2) != 1:
            raise NotShared("completions do not grow by one token at a time")
        if self.length == self.room:
            self.room = room_for(self.length + 1)
            self.keys, self.values = (
                _widened(old, new, self.length, self.room)
                for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, :, self.length] = keys[:, :, 0]
        self.values[:, :, self.length] = values[:, :, 0]
        self.length += 1
        return self, self

    def keep(self, rows: "torch.Tensor", prompts: "torch.Tensor | None") -> None:
        """Drop all rows but these and, unless it is None, all prompts but these."""
        if self.room:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if prompts is not None:
            self.prefix, self.prefix_values = self.prefix[prompts], self.prefix_values[prompts]
            self.mask = None if self.mask is None else self.mask[prompts]

    def attend(self, query: "torch.Tensor", scaling: float) -> "torch.Tensor":
        """(rows, heads, 1, size) to (rows, 1, heads, size of values)."""
        rows, heads, _, size = query.shape
        kept = self.prefix.size(2)
        gone = 0 if self.window is None else max(0, self.length - self.window + kept)
        own = slice(max(0, gone - kept), self.length)
        prefix, mask = (
            self.prefix[:, :, gone:],
            None if self.mask is None else self.mask[..., gone:],
        )
        query = (query * scaling).reshape(rows, self.prefix.size(1), -1, size)
        scores = self.branches.grid(query) @ prefix.transpose(2, 3)
        scores = self.branches.flat(scores if mask is None else scores + mask)
        scores = _joined(scores, query @ self.keys[:, :, own].transpose(2, 3))
        weights = scores.float().softmax(-1).to(query.dtype)
        width = prefix.size(2)
        out = weights[..., width:] @ self.values[:, :, own]
        shared = self.branches.grid(weights[..., :width]) @ self.prefix_values[:, :, gone:]
        return (out + self.branches.flat(shared)).reshape(rows, 1, heads, -1)


def share(cache: Any, branches: Branches, attention_mask: "torch.Tensor") -> Any:
    """Turn a cache of prompts, one row a prompt, into one of rows that branch off from them.

    `attention_mask` (prompts, tokens) is 0 at padding. Raises NotShared for another kind of cache.
    """
    from transformers.cache_utils import CacheLayerMixin

    if names := unknown_kinds(cache):
        raise NotShared(f"its cache is made of {', '.join(names)}")
    mask = None
    if not bool(attention_mask.all()):
        padding = attention_mask[:, None, None] == 0
        like = cache.layers[0].keys
        mask = like.new_zeros(padding.shape).masked_fill(padding, float("-inf"))
    CacheLayerMixin.register(SharedLayer)
    cache.layers = [SharedLayer(layer, branches, mask) for layer in cache.layers]
    return cache


def unknown_kinds(cache: Any) -> list[str]:
    """The names of a cache's kinds of layers, unless `share` knows all of them; then []."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    if type(cache) is DynamicCache and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return []
    return sorted(kind.__name__ for kind in kinds) or [type(cache).__name__]


def room_for(tokens: int) -> int:
    """The columns that are allocated once so many are in use: they double as completions grow."""
    return ROOM << max(0, (tokens - 1) // ROOM).bit_length()


def attend(
    module: Any,
    query: "torch.Tensor",
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple["torch.Tensor", None]:
    """The attention function of transformers' interface, for a SharedLayer as keys and values."""
    if not isinstance(key, SharedLayer):
        raise NotShared("it has attention to other tokens than those of prompt and completion")
    for name in ("softcap", "s_aux", "dropout"):
        if options.get(name) not in (None, 0):
            raise NotShared(f"its attention has the option {name}")
    return key.attend(query, query.size(-1) ** -0.5 if scaling is None else scaling), None


def _widened(old: "torch.Tensor", new: "torch.Tensor", length: int, room: int) -> "torch.Tensor":
    """A tensor (rows, heads, `room`, size) for more tokens like `new`, with the first ones of `old`."""
    wide = new.new_empty(new.size(0), new.size(1), room, new.size(3))
    if length:
        wide[:, :, :length] = old[:, :, :length]
    return wide


def _joined(one: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.cat([one, other], -1)
