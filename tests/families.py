"""Tiny, randomly initialised models of other families, with processors of their own kind.

Nothing of the project knows their names: image size, chat template and parts are found from the
processor and the config. Their tokenizer is the tiny policy's, with the special tokens each needs.
"""

from pathlib import Path

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests import real_shape
from tests.family_parts import (
    PATCH,
    SIDE,
    TEXT,
    VISION,
    as_published,
    make_tokenizer,
    save,
    template,
    text_config,
    tiled_tokenizer,
)
from training.model import tiny_policy


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
    return save(Qwen3VLForConditionalGeneration, config, processor, folder)


def real_vocabulary(folder: Path, words: list[str]) -> Path:
    """A narrow Qwen2.5-VL with the published vocabulary and chat template, in bfloat16."""
    real_shape.write(folder, layers=2, vision_layers=2, narrow=True)
    return folder


def gemma3(folder: Path, words: list[str]) -> Path:
    """A Gemma-3 of 56 x 56 pixels: 16 patches of 14, pooled to 4 image tokens."""
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = make_tokenizer(words, "<bos>", **marks)
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
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_index=soft,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        chat_template=template("<start_of_image>", "<bos>"),
        image_seq_length=4,
    )
    save(Gemma3ForConditionalGeneration, config, processor, folder)
    return as_published(folder)


def idefics3(folder: Path, words: list[str], *, tiles: bool = True) -> Path:
    """An Idefics3: an image and its tiles, of 56 x 56 pixels and 4 image tokens each."""
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 2 * SIDE},
            max_image_size={"longest_edge": SIDE},
            do_image_splitting=tiles,
        ),
        tokenizer=tiled_tokenizer(words, "<|begin_of_text|>"),
        image_seq_len=4,
        chat_template=template("<image>", "<|begin_of_text|>"),
    )
    config = _idefics_config(Idefics3Config, processor)
    return save(Idefics3ForConditionalGeneration, config, processor, folder)


def idefics3_untiled(folder: Path, words: list[str]) -> Path:
    """An Idefics3 whose images are not split."""
    return idefics3(folder, words, tiles=False)


def smolvlm(folder: Path, words: list[str]) -> Path:
    """A SmolVLM: an image and its tiles, as in Idefics3."""
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        tokenizer=tiled_tokenizer(words),
        video_processor=SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = _idefics_config(SmolVLMConfig, processor)
    return save(SmolVLMForConditionalGeneration, config, processor, folder)


def llava_onevision(folder: Path, words: list[str]) -> Path:
    """A LLaVA-OneVision: an image and up to two tiles of 56 x 56 pixels, 16 image tokens each."""
    tokenizer = make_tokenizer(words, image_token="<image>", video_token="<video>")
    grids = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaOnevisionConfig(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=grids,
        tie_word_embeddings=True,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    save(LlavaOnevisionForConditionalGeneration, config, processor, folder)
    return as_published(folder)


def internvl(folder: Path, words: list[str]) -> Path:
    """An InternVL: up to two tiles of 56 x 56 pixels with a thumbnail, 4 image tokens each."""
    tokenizer = make_tokenizer(
        words,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config=text_config(tokenizer, "qwen2"),
        vision_config=VISION,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=True,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=2),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    return save(InternVLForConditionalGeneration, config, processor, folder)


def _idefics_config(kind, processor):
    tokenizer = processor.tokenizer
    return kind(
        text_config=text_config(tokenizer, "llama"),
        vision_config=VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
