"""A random Qwen2.5-VL with the published widths, vocabulary, chat template and ways of generating.

The weights are drawn here; the vocabulary is that of the PyPI package dashscope, of which nothing is
imported. Layers can be left out, and for a small test widths as well.
"""

import base64
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from training.model.shapes import config_of

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
# In the order of their ids, which begin behind the vocabulary, at 151,643.
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# A system turn where the chat has none, as the published template writes it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GENERATION = {
    "bos_token_id": 151_643,
    "pad_token_id": 151_643,
    "eos_token_id": [151_645, 151_643],
    "do_sample": True,
    "temperature": 1e-6,
    "repetition_penalty": 1.05,
}


def write(folder: Path, *, layers: int, vision_layers: int, narrow: bool = False) -> int:
    """Write the policy folder, in bfloat16; returns the number of weights.

    `narrow` makes all widths but the vocabulary's small.
    """
    config = config_of(MODEL)
    text, vision = config.text_config, config.vision_config
    if narrow:
        text.hidden_size, text.intermediate_size = 64, 128
        text.num_attention_heads, text.num_key_value_heads = 2, 1
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 6, 6]}
        vision.hidden_size, vision.intermediate_size, vision.num_heads = 32, 64, 2
        vision.out_hidden_size = text.hidden_size
    text.num_hidden_layers, vision.depth = layers, vision_layers
    text.layer_types = text.layer_types[:layers]
    # Every fourth layer of the vision tower sees the whole image; the last one kept does.
    full = [layer for layer in vision.fullatt_block_indexes if layer < vision_layers]
    vision.fullatt_block_indexes = full or [vision_layers - 1]
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(kept)
    model.generation_config = GenerationConfig(**GENERATION)
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(pixels)),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=dict(pixels)),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model.num_parameters()


def tokenizer() -> Qwen2Tokenizer:
    """Qwen2.5's: 151,643 pieces of bytes, and its special tokens."""
    spec = find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise SystemExit("Qwen's vocabulary comes with dashscope: pip install --no-deps dashscope")
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    ranks = dict(line.split() for line in path.read_bytes().splitlines())
    pieces = {base64.b64decode(piece): int(rank) for piece, rank in ranks.items()}
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: pieces
    vocabulary, merges = converter.extract_vocab_merges_from_model("")
    vocabulary |= {token: len(pieces) + place for place, token in enumerate(SPECIAL)}
    made = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=131_072,
    )
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return made
