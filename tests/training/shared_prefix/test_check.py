"""What is said of the batch that training begins with."""

import pytest
import torch

from training.shared_prefix import check


@pytest.fixture
def compare():
    """Hold a pass against a linear layer's own; `noise` is how far the second look is off."""
    layer = torch.nn.Linear(3, 4)
    x, counted = torch.ones(2, 3), torch.ones(2, 4)

    def compare(wrong, exact=True, noise=0.0):
        looks = []

        def separate(rows):
            looks.append(rows)
            off = noise if len(looks) > 1 else 0.0
            return layer(x[rows]) + off * torch.tensor([1.0, -1.0, 1.0, -1.0])

        return check.compare(
            layer, lambda rows: wrong(layer(x[rows])), separate, [[0], [1]], counted,
            gradients=True, exact=exact,
        )  # fmt: skip

    compare.layer = layer
    return compare


def test_equal_passes_agree_and_leave_no_gradient(compare):
    verdict = compare(lambda logps: logps)
    assert verdict.agrees
    assert "mean 0.0e+00" in verdict.figures
    assert compare.layer.weight.grad is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda logps: logps + 0.5,
        lambda logps: logps * torch.nan,
        lambda logps: logps + torch.tensor([0.5, 0.0, 0.0, 0.0]),  # one token of four
        lambda logps: logps * 1.01,
        lambda logps: logps.detach() + 0 * logps,  # right values without a gradient
    ],
)
def test_a_fault_is_found_in_float32(compare, wrong):
    assert not compare(wrong).agrees


def test_what_a_machine_does_by_itself_is_allowed_for_and_a_bias_is_not(compare):
    to_and_fro = torch.tensor([0.1, -0.1, 0.1, -0.1])
    assert not compare(lambda logps: logps + to_and_fro, exact=False).agrees
    assert compare(lambda logps: logps + to_and_fro, exact=False, noise=0.1).agrees
    assert not compare(lambda logps: logps + 0.1, exact=False, noise=0.1).agrees
