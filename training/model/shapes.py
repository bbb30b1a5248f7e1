"""A model's configuration, without the network: from its folder, the hub's cache, or a table here.

With the table, memory needs can be estimated, and a step tried at the real widths, on a machine that
has neither the weights nor access to the hub. Its shapes are copied from the `config.json` of each
repository of the hub. A folder or a cached copy takes precedence.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, Gemma3Config, PretrainedConfig, Qwen2_5_VLConfig

from tasks.runtime.errors import StageError


def config_of(model: str | Path) -> PretrainedConfig:
    """The configuration of a folder or of a hub id, without the network.

    Raises StageError where this machine has none and the table has none.
    """
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        if str(model) in SHAPES:
            kind, fields = SHAPES[str(model)]
            return kind(**fields)
        raise StageError(
            f"no config of {model} lies on this machine; give a folder, or load it once from the hub "
            f"(known without it: {', '.join(SHAPES)})"
        ) from error


def _qwen2_5_vl(*, tied: bool, hidden_size: int, **text: int) -> dict[str, Any]:
    return {
        "text_config": {
            "hidden_size": hidden_size,
            "max_position_embeddings": 128_000,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "tie_word_embeddings": tied,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            **text,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653,
        "tie_word_embeddings": tied,
    }


def _gemma3(**text: int) -> dict[str, Any]:
    return {
        "text_config": {"head_dim": 256, "sliding_window": 1024, "vocab_size": 262_208, **text},
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        Qwen2_5_VLConfig,
        _qwen2_5_vl(
            tied=True,
            hidden_size=2048,
            intermediate_size=11_008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151_936,
        ),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        Qwen2_5_VLConfig,
        _qwen2_5_vl(
            tied=False,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152_064,
        ),
    ),
    "google/gemma-3-4b-it": (
        Gemma3Config,
        _gemma3(
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
    ),
    "google/gemma-3-12b-it": (
        Gemma3Config,
        _gemma3(
            hidden_size=3840,
            intermediate_size=15_360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
    ),
}
