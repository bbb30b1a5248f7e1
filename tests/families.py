"""Tiny, randomly initialised models of other families, with processors of their own kind.

Nothing of the project knows their names: image size, chat template and parts are found from the
processor and the config. Their tokenizer is the tiny policy's, with the special tokens each needs.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from training import tiny_policy

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def qwen3_vl(folder: Path, words: list[str]) -> Path:
    """A Qwen3-VL of 84 x 84 pixels: patches of 14, merged two by two, deepstack features."""
    tokenizer = tiny_policy.tokenizer(words)
    ids = {token: index for index, token in enumerate(tiny_policy.SPECIAL)}
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": tiny_policy.VOCABULARY,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": TEXT["hidden_size"],
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 36,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    pixels = {"shortest_edge": 84**2, "longest_edge": 84**2}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(pixels), patch_size=14),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=dict(pixels), patch_size=14),
        chat_template=tiny_policy.CHAT_TEMPLATE,
    )
    return _save(Qwen3VLForConditionalGeneration, config, processor, folder)


def gemma3(folder: Path, words: list[str]) -> Path:
    """A Gemma-3 of 56 x 56 pixels: 16 patches of 14, pooled to 4 image tokens."""
    tokenizer = tiny_policy.tokenizer(words)
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=marks,
    )
    tokenizer.add_tokens(["\n\n", "\n\n\n", "\n\n\n\n"])  # stand around an image in this family
    boi, eoi, soft = tokenizer.convert_tokens_to_ids(list(marks.values()))
    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "sliding_window": 256,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=soft,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    template = tiny_policy.CHAT_TEMPLATE.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>"
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        chat_template=template,
        image_seq_length=4,
    )
    _save(Gemma3ForConditionalGeneration, config, processor, folder)
    # As the published weights are named, which is what vLLM knows; loading and saving keeps it.
    path = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def _save(kind, config, processor, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    tiny_policy.save(model, processor, folder)
    return folder
