"""Shapes that are known without the hub have the sizes that their model cards give."""

import pytest
import torch

from tasks.runtime.errors import StageError
from training.model.shapes import SHAPES, config_of

BILLIONS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "google/gemma-3-4b-it": 4.30,
    "google/gemma-3-12b-it": 12.19,
}


@pytest.mark.parametrize("model", SHAPES)
def test_a_known_shape_has_the_weights_of_its_model_card(model):
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config_of(model))
    assert sum(p.numel() for p in made.parameters()) / 1e9 == pytest.approx(
        BILLIONS[model], abs=0.01
    )


def test_an_unknown_model_is_named_with_what_helps(tmp_path):
    with pytest.raises(StageError, match="no config of nobody/nothing"):
        config_of("nobody/nothing")
