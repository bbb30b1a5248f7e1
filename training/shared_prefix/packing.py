"""Index arithmetic: splits rows into micro-batches, and packs a micro-batch into one row.

Terms: a row is one completion with its prompt, as TRL keeps them: prompts padded on the left,
completions on the right. A group is the rows that share a prompt and an image. A micro-batch is the
rows that go through the model together.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from training.shared_prefix.attention import Layout, Span, padded_length


def members(groups: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each group, groups in order of first appearance."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


def shuffled(groups: Sequence[int], permutation: Sequence[int]) -> list[int]:
    """All rows, group by group, in the order in which a permutation of the rows reaches the groups.

    The permutation is one of rows, as TRL draws it, so that both draw the same random numbers.
    """
    rows = members(groups)
    order = dict.fromkeys(groups[row] for row in permutation)
    return [row for group in order for row in rows[group]]


def split(
    groups: Sequence[int],
    rows: Sequence[int],
    prompts: Sequence[int],
    completions: Sequence[int],
    limit: int,
    most_rows: int = 0,
    shared: bool = True,
) -> list[list[int]]:
    """Split `rows` into micro-batches of at most `limit` tokens and `most_rows` rows (0: no bound).

    `prompts` and `completions` are each row's lengths in tokens. A group is split only if it does not
    fit into one micro-batch. A row longer than `limit` gets a micro-batch of its own. With `shared` a
    prompt counts once for all its rows in a micro-batch. Rows without a completion token are left
    out, since none of their tokens is scored.
    """
    rows = [row for row in rows if completions[row]]
    wholes: dict[int, int] = {}
    for row in rows:
        start = wholes.get(groups[row], prompts[row] if shared else 0)
        wholes[groups[row]] = start + completions[row] + (0 if shared else prompts[row])
    batches: list[list[int]] = []
    here: set[int] = set()
    tokens = 0
    for row in rows:
        new = groups[row] not in here
        cost = completions[row] + (prompts[row] if new or not shared else 0)
        full = bool(limit) and tokens + cost > limit
        # A group that fits into one micro-batch does not begin in one with too little room.
        cut = new and bool(limit) and wholes[groups[row]] <= limit < tokens + wholes[groups[row]]
        if not batches or full or cut or (most_rows and len(batches[-1]) >= most_rows):
            batches.append([])
            here, tokens = set(), 0
            cost = completions[row] + prompts[row]
        batches[-1].append(row)
        here.add(groups[row])
        tokens += cost
    return batches


@dataclass(frozen=True)
class Packed:
    """A micro-batch packed into one row of `length` tokens. Indices are into TRL's flattened tensors.

    For each token of the row (length,):
    - `token`: the index of its id in the ids (rows, prompt and completion)
    - `label`: the index of the id that it must predict, or -1
    - `place`: the index of its position in (groups, prompt); completion tokens have the prompt's last
    - `ahead`: the number of positions after `place`, 0 for prompt tokens
    For each scored token:
    - `scored`: its index in the packed row
    - `result`: its index in (rows, completion)
    """

    length: int
    spans: list[Span]
    groups: list[int]
    token: torch.Tensor
    label: torch.Tensor
    place: torch.Tensor
    ahead: torch.Tensor
    scored: torch.Tensor
    result: torch.Tensor

    def layout(self, device: torch.device) -> Layout:
        return Layout(self.spans, self.length, device)


def pack(
    groups: Sequence[int],
    rows: Sequence[int],
    prompts: Sequence[int],
    completions: Sequence[int],
    prompt_width: int,
    width: int,
    device: torch.device,
) -> Packed:
    """Pack `rows`: each group's prompt once, without its last token, then its completions.

    Every completion is preceded by a copy of the prompt's last token, which predicts its first token.
    Its own last token predicts nothing and is left out. So a branch has as many tokens as are scored.
    `prompts` and `completions` are lengths in tokens; `prompt_width` and `width` are those of TRL's
    tensors.
    """
    token, label, place, ahead, scored, result = ([] for _ in range(6))
    spans, order = [], list(members(groups))
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(groups[row], []).append(row)
    at = 0
    for index, own in enumerate(by_group.values()):
        prefix = prompts[own[0]] - 1
        columns = torch.arange(prompt_width - 1 - prefix, prompt_width - 1)
        token.append(own[0] * width + columns)
        label.append(torch.full((prefix,), -1))
        place.append(index * prompt_width + columns)
        ahead.append(torch.zeros(prefix, dtype=torch.long))
        spans.append(Span(at, prefix, tuple(completions[row] for row in own)))
        at += prefix
        for row in own:
            steps = torch.arange(completions[row])
            token.append(row * width + prompt_width - 1 + steps)
            label.append(row * width + prompt_width + steps)
            place.append(torch.full_like(steps, (index + 1) * prompt_width - 1))
            ahead.append(steps)
            scored.append(at + steps)
            result.append(row * (width - prompt_width) + steps)
            at += len(steps)
    length = padded_length(at, device)
    # Padding repeats the first token; no other token attends to it, and it is not scored.
    fill = torch.zeros(length - at, dtype=torch.long)
    token.append(fill + token[0][0] if len(fill) else fill)
    label.append(fill - 1)
    place.append(fill + place[0][0] if len(fill) else fill)
    ahead.append(fill)
    return Packed(
        length,
        spans,
        [order.index(group) for group in by_group],
        *(torch.cat(part).to(device) for part in (token, label, place, ahead, scored, result)),
    )


@dataclass
class Counters:
    """What one process has computed since training began."""

    lm_tokens: int = 0  # tokens through the language model, in training and reference passes
    lm_tokens_ideal: int = 0  # with every prompt once a group, for the same passes
    lm_tokens_stock: int = 0  # in TRL's padded rows, for the same passes
    vision_patches: int = 0  # rows of pixel values through the vision tower, in the same passes
    image_processor_calls: int = 0
    unique_images: int = 0  # of each generation batch
    completion_tokens_useful: int = 0
    completion_tokens_forwarded: int = 0
    groups: int = 0
    zero_advantage_groups: int = 0
    zero_advantage_groups_forwarded: int = 0
    seconds: float = 0.0  # in the training passes, forward and backward
    _last: dict[str, float] = field(default_factory=dict, repr=False)

    def since_last(self) -> dict[str, float]:
        """The counts since the last call, `useful_share` and `token_saving`."""
        now = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        new = {name: value - self._last.get(name, 0) for name, value in now.items()}
        self._last = now
        new["useful_share"] = _share(
            new["completion_tokens_useful"], new["completion_tokens_forwarded"]
        )
        new["token_saving"] = 1 - _share(new["lm_tokens"], new["lm_tokens_stock"])
        return new


class Stopwatch:
    """Adds the seconds spent inside to `counters.seconds`."""

    def __init__(self, counters: Counters):
        self.counters = counters

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.counters.seconds += time.perf_counter() - self.started


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0
