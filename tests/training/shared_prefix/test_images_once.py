"""Other architectures: images are encoded once, prompts go through with each completion."""

import pytest
import torch

from tests import prefix_models
from tests.prefix_models import Drawn, apart, some_dead, told, trainer, weights
from training.shared_prefix import images_once
from training.shared_prefix.forward import sharing


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def qwen3_vl(policy):
    """A Qwen3-VL, whose vision tower also feeds the first layers of the language model."""
    from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = AutoConfig.from_pretrained(policy)
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": ids.text_config.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **{n: getattr(ids, n) for n in names})
    )


@pytest.mark.model
def test_another_architecture_shares_its_images(policy, tmp_path, capsys):
    given = {"reward": some_dead, "max_steps": 3, "drawn": Drawn()}
    ours = trainer(policy, tmp_path / "ours", model=qwen3_vl(policy), tokens=200, **given)
    assert "images are encoded once a group" in capsys.readouterr().out
    ours.train()
    assert "agree on the first batch" in capsys.readouterr().out
    stock = trainer(policy, tmp_path / "stock", model=qwen3_vl(policy), shared=False, **given)
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    assert ours.counters.zero_advantage_groups_forwarded == 0 < ours.counters.zero_advantage_groups
    alive = ours.counters.groups - ours.counters.zero_advantage_groups
    assert ours.counters.vision_patches <= 24 * alive  # 56 x 84 pixels at most


@pytest.mark.model
def test_copies_of_an_image_are_encoded_once_and_pass_their_gradient_back():
    """Gemma 3: pixels a picture rather than patches, and one tensor of features."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 8}
    config = Gemma3Config(
        text_config=text | heads | {"sliding_window": 8},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 16},
        mm_tokens_per_image=4, image_token_index=7,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    assert sharing(model) == ("vision", "gemma3, for which there is no shared prefix")
    ids = torch.tensor([[7] * 4 + [9, 10]] * 5)
    pixels = torch.randn(2, 3, 16, 16)[[0, 0, 0, 1, 1]]
    found = []
    encoder = None
    for shared in (False, True):
        if shared:
            encoder = images_once.ImagesOnce(model.base_model)
        model.zero_grad()
        logits = model(input_ids=ids, pixel_values=pixels).logits
        logits.square().sum().backward()
        gradient = model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad
        found.append((logits.detach(), gradient.clone()))
    assert encoder.patches == 2
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
