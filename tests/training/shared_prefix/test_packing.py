"""Which rows are forwarded together, and where their tokens stand."""

import itertools
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.shared_prefix import packing

groups_and_lengths = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6
)


def flat(lengths):
    groups = [group for group, own in enumerate(lengths) for _ in own]
    return groups, [length for own in lengths for length in own]


@given(groups_and_lengths, st.integers(0, 40), st.integers(1, 9))
def test_every_row_is_forwarded_once_and_within_the_bound(lengths, limit, prompt):
    groups, completions = flat(lengths)
    prompts = [prompt + group for group in groups]
    batches = packing.split(groups, range(len(groups)), prompts, completions, limit)
    assert [row for rows in batches for row in rows] == [
        row for row, length in enumerate(completions) if length
    ]
    for rows in batches if limit else []:
        tokens = sum({groups[row]: prompts[row] for row in rows}.values())
        tokens += sum(completions[row] for row in rows)
        assert tokens <= limit or len(rows) == 1


@given(groups_and_lengths, st.integers(30, 80))
def test_a_group_that_fits_is_not_cut(lengths, limit):
    groups, completions = flat(lengths)
    prompts = [4] * len(groups)
    batches = packing.split(groups, range(len(groups)), prompts, completions, limit)
    parts = Counter(group for rows in batches for group in {groups[row] for row in rows})
    for group, own in enumerate(lengths):
        if 4 + sum(own) <= limit:
            assert parts[group] <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms())
def test_shuffling_keeps_groups_together(sizes, random):
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    permutation = list(range(len(groups)))
    random.shuffle(permutation)
    rows = packing.shuffled(groups, permutation)
    assert sorted(rows) == sorted(permutation)
    changes = sum(groups[a] != groups[b] for a, b in itertools.pairwise(rows))
    assert changes == len(sizes) - 1
    assert groups[rows[0]] == groups[permutation[0]]


@given(groups_and_lengths)
def test_packed_tokens_are_those_of_the_rows(lengths):
    groups, completions = flat(lengths)
    rows = [row for row, length in enumerate(completions) if length]
    if not rows:
        return
    prompts, width = [2 + group for group in groups], 8
    ids = torch.arange(len(groups) * (width + 9)).view(len(groups), -1)
    pack = packing.pack(groups, rows, prompts, completions, width, width + 9, torch.device("cpu"))
    assert pack.length == sum(prompts[r] - 1 for r in {groups[r]: r for r in rows}.values()) + sum(
        completions
    )
    tokens, labels = ids.flatten()[pack.token], ids.flatten()[pack.label]
    assert torch.equal(labels[pack.scored], ids[:, width:].flatten()[pack.result])
    assert torch.equal(tokens[pack.scored], ids[:, width - 1 : -1].flatten()[pack.result])
    assert (pack.label >= 0).sum() == len(pack.scored) == sum(completions)
