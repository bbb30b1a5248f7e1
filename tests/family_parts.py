"""What the families of `tests.families` have in common: sizes, tokenizers, how they are saved."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from training.model import tiny_policy

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


def tiled_tokenizer(words: list[str], bos: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with the marks around an image and before each tile, as Idefics3 and SmolVLM have."""
    tokenizer = make_tokenizer(
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


def text_config(tokenizer, kind: str) -> dict:
    return {**TEXT, "model_type": kind, "vocab_size": len(tokenizer)}


def template(image: str, bos: str = "") -> str:
    """The tiny policy's chat template, with the placeholder that a family's processor expands."""
    own = "<|vision_start|><|image_pad|><|vision_end|>"
    return bos + tiny_policy.CHAT_TEMPLATE.replace(own, image)


def make_tokenizer(words: list[str], bos: str = "", **marks: str) -> PreTrainedTokenizerFast:
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


def save(kind, config, processor, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    tiny_policy.save(model, processor, folder)
    return folder


def as_published(folder: Path) -> Path:
    """Names of weights as the published ones have, which vLLM knows; loading and saving keeps them."""
    path = folder / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
