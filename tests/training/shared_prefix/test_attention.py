"""Who sees whom in a packed row."""

import torch

from training.shared_prefix import attention
from training.shared_prefix.attention import Layout, Span


def seen_by(spans, length):
    """The rule, spelt out token by token."""
    group, branch = [-1] * length, [0] * length
    for number, span in enumerate(spans):
        at = span.start + span.prefix
        group[span.start : span.stop] = [number] * (span.stop - span.start)
        for index, size in enumerate(span.branches):
            branch[at : at + size] = [index + 1] * size
            at += size
    return torch.tensor(
        [
            [group[a] == group[b] and b <= a and branch[b] in (0, branch[a]) for b in range(length)]
            for a in range(length)
        ]
    )


SPANS = [Span(0, 5, (3, 1, 4)), Span(13, 0, (2, 2)), Span(17, 6, (7,))]


def test_attention_is_that_of_the_rule():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen_by(SPANS, 30), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    layout = Layout(SPANS, 30, torch.device("cpu"))
    found, _ = attention.attention(torch.nn.Module(), query, key, value, layout, 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (found, expected)
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_mask_for_a_gpu_is_that_of_the_rule():
    mask = attention._block_mask(SPANS, 128, torch.device("cpu"), compiled=False)
    tokens = torch.arange(128)
    seen = mask.mask_mod(0, 0, tokens[:, None], tokens[None])
    assert torch.equal(seen[:30, :30], seen_by(SPANS, 30))
    assert not seen[30:, :30].any()
    assert not seen[:30, 30:].any()
    assert seen.diagonal().all()  # a token that sees nothing would make the softmax NaN
