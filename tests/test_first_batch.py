"""What is said of the batch that training begins with."""

import pytest
import torch

from tasks.run import StageError
from training import first_batch


def test_a_disagreement_says_by_how_much():
    layer = torch.nn.Linear(3, 4)
    mask = torch.ones(2, 4)
    x = torch.ones(2, 3)

    def compare(wrong, exact=True):
        return first_batch.compare(
            layer, wrong, lambda: (layer(x), mask), gradients=True, exact=exact
        )

    told = compare(lambda: (layer(x), mask))
    assert told.endswith("log-probabilities within 0.0e+00, gradients within 0.0e+00 of their norm")
    for wrong in (lambda: (layer(2 * x), mask), lambda: (layer(x) * torch.nan, mask)):
        with pytest.raises(StageError, match="shared_prefix = false"):
            compare(wrong)
    assert compare(lambda: (layer(x) * 1.01, mask), exact=False)
    assert layer.weight.grad is None
