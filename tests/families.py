"""Tiny, randomly initialised models of other families, with processors of their own kind.

Nothing of the project knows their names: image size, chat template and parts are found from the
processor and the config. Their tokenizer is the tiny policy's, with the special tokens each needs.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GenerationConfig,
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
    PreTrainedTokenizerFast,
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
SIDE, PATCH = 56, 14  # pixels of a tile and of a patch, in the families below Qwen's
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
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
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = _tokenizer(words, "<bos>", **marks)
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
        chat_template=_template("<start_of_image>", "<bos>"),
        image_seq_length=4,
    )
    _save(Gemma3ForConditionalGeneration, config, processor, folder)
    return _as_published(folder)


def idefics3(folder: Path, words: list[str], *, tiles: bool = True) -> Path:
    """An Idefics3: an image and its tiles, of 56 x 56 pixels and 4 image tokens each."""
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(
            size={"longest_edge": 2 * SIDE},
            max_image_size={"longest_edge": SIDE},
            do_image_splitting=tiles,
        ),
        tokenizer=_tiled_tokenizer(words, "<|begin_of_text|>"),
        image_seq_len=4,
        chat_template=_template("<image>", "<|begin_of_text|>"),
    )
    config = _idefics_config(Idefics3Config, processor)
    return _save(Idefics3ForConditionalGeneration, config, processor, folder)


def idefics3_untiled(folder: Path, words: list[str]) -> Path:
    """An Idefics3 whose images are not split."""
    return idefics3(folder, words, tiles=False)


def smolvlm(folder: Path, words: list[str]) -> Path:
    """A SmolVLM: an image and its tiles, as in Idefics3."""
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        tokenizer=_tiled_tokenizer(words),
        video_processor=SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=_template("<image>"),
    )
    config = _idefics_config(SmolVLMConfig, processor)
    return _save(SmolVLMForConditionalGeneration, config, processor, folder)


def llava_onevision(folder: Path, words: list[str]) -> Path:
    """A LLaVA-OneVision: an image and up to two tiles of 56 x 56 pixels, 16 image tokens each."""
    tokenizer = _tokenizer(words, image_token="<image>", video_token="<video>")
    grids = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaOnevisionConfig(
        text_config=_text(tokenizer, "qwen2"),
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
        chat_template=_template("<image>"),
    )
    _save(LlavaOnevisionForConditionalGeneration, config, processor, folder)
    return _as_published(folder)


def internvl(folder: Path, words: list[str]) -> Path:
    """An InternVL: up to two tiles of 56 x 56 pixels with a thumbnail, 4 image tokens each."""
    tokenizer = _tokenizer(
        words,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config=_text(tokenizer, "qwen2"),
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
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return _save(InternVLForConditionalGeneration, config, processor, folder)


def _tiled_tokenizer(words: list[str], bos: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with the marks around an image and before each tile, as Idefics3 and SmolVLM have."""
    tokenizer = _tokenizer(
        words,
        bos,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_tokens(places, special_tokens=True)
    return tokenizer


def _idefics_config(kind, processor):
    tokenizer = processor.tokenizer
    return kind(
        text_config=_text(tokenizer, "llama"),
        vision_config=VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )


def _text(tokenizer, kind: str) -> dict:
    return {**TEXT, "model_type": kind, "vocab_size": len(tokenizer)}


def _template(image: str, bos: str = "") -> str:
    """The tiny policy's chat template, with the placeholder that a family's processor expands."""
    own = "<|vision_start|><|image_pad|><|vision_end|>"
    return bos + tiny_policy.CHAT_TEMPLATE.replace(own, image)


def _tokenizer(words: list[str], bos: str = "", **marks: str) -> PreTrainedTokenizerFast:
    """The tiny policy's tokenizer with a family's own special tokens, by the names of its own.

    With `bos` it puts that token before every text, though the chat template has it as well.
    """
    backend = tiny_policy.tokenizer(words).backend_tokenizer
    if bos:
        backend.add_special_tokens([bos])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos or None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=marks,
    )


def _save(kind, config, processor, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    tiny_policy.save(model, processor, folder)
    return folder


def _as_published(folder: Path) -> Path:
    """Names of weights as the published ones have, which vLLM knows; loading and saving keeps them."""
    path = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
