"""The tiny embedded policy: a Qwen2.5-VL of under two million parameters, built and taught here.

It stands in for a real vision-language model where there is neither GPU nor network, and loads
like one: `AutoModelForImageTextToText`, `AutoProcessor`, vLLM.

Its vocabulary has a fixed size: bytes, the words of the prompts, and numbered slots for whole
words. The shipped weights (`tiny_policy_seed/`) are trained on text alone, over random slots: they
know the form of a completion and can find the option whose name stands in the thought and copy its
letter, whatever slots that name is made of. A card's words are put into slots when a policy is
built for it (`build`), so the same weights serve every dataset; only seeing is left to learn.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SEED_FOLDER = Path(__file__).parent / "tiny_policy_seed"
VOCABULARY = 1024
IMAGE_SIDE = 84  # pixels; three patches of 28 a side make nine image tokens

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Not special to the tokenizer, because they must survive decoding. The line break stands here so
# that the word after it is cut like any other: the letter of an option and the letter of an
# answer are then one token.
MARKS = ("<think>", "</think>", "<answer>", "</answer>", "\n")
PUNCTUATION = tuple(".,;:?!")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# Words of the prompts and of the taught completions. Their order is part of the shipped weights:
# append, never insert. A word that is missing here is still understood, byte by byte.
WORDS = tuple(
    "What of is this It one these Think between and Then give name letter looks like user "
    "assistant system First reason step by describe the traits you can see what they speak for "
    "most likely say which visible tell options apart them image shows exactly option".split()
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PIECE = re.compile(r" ?[^ .,;:?!]+| ?[.,;:?!]| ")


def slot_words(texts: Iterable[str]) -> list[str]:
    """The distinct words in `texts` that the fixed vocabulary lacks, in order of appearance."""
    known = {*WORDS, *LETTERS, *PUNCTUATION}
    pieces = (piece.strip() for text in texts for piece in _PIECE.findall(text))
    return list(dict.fromkeys(piece for piece in pieces if piece and piece not in known))


def tokenizer(words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer with `words` in its slots; words beyond the last slot are spelt in bytes.

    A space is put before each stretch of text between marks and taken away again in decoding, so
    a word is the same token at the beginning of an answer and inside a sentence.
    """
    fixed = [*SPECIAL, *MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fixed += [mark for mark in PUNCTUATION if mark not in fixed]
    fixed += ["Ġ" + word for word in (*LETTERS, *WORDS)]
    slots = [f"Ġ<slot {index}>" for index in range(VOCABULARY - len(fixed))]
    taken = ["Ġ" + _to_bytes(word) for word in words][: len(slots)]
    vocabulary = {piece: index for index, piece in enumerate([*fixed, *taken, *slots[len(taken) :]])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    unspace = [decoders.Replace(mark + " ", mark) for mark in (*SPECIAL, *MARKS)]
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Fuse(), *unspace, decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def processor(
    words: Iterable[str] = (), *, min_pixels: int = IMAGE_SIDE**2, max_pixels: int = IMAGE_SIDE**2
) -> Qwen2_5_VLProcessor:
    """Tokenizer, image processor and chat template. Smaller photographs are scaled up."""
    pixels = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(pixels)),
        tokenizer=tokenizer(words),
        video_processor=Qwen2VLVideoProcessor(size=dict(pixels)),
        chat_template=CHAT_TEMPLATE,
    )


def config() -> Qwen2_5_VLConfig:
    """The architecture of the tiny policy."""
    ids = {token: index for index, token in enumerate(SPECIAL)}
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            # 1 / sqrt(hidden size): at the usual 0.02 so narrow a model hardly attends at first.
            "initializer_range": 0.088,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e5,
                "mrope_section": [8, 12, 12],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2],
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def new_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained policy in float32; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config())
    model.generation_config = GenerationConfig(
        do_sample=True,
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
    )
    return model


def build(
    words: Iterable[str],
    *,
    seed: int,
    min_pixels: int = IMAGE_SIDE**2,
    max_pixels: int = IMAGE_SIDE**2,
    weights: Path = SEED_FOLDER / "model.safetensors",
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The shipped weights with `words` in the slots; `seed` draws what they do not hold: the eyes."""
    model = new_model(seed)
    if weights.exists():
        learned = {name: value.float() for name, value in load_file(weights).items()}
        _, unexpected = model.load_state_dict(learned, strict=False)
        if unexpected:
            raise ValueError(f"{weights} does not fit this architecture: {unexpected[:3]}")
    return model, processor(words, min_pixels=min_pixels, max_pixels=max_pixels)


def save(model: torch.nn.Module, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Write a policy folder that transformers and vLLM load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _to_bytes(word: str) -> str:
    """A word as the byte-level alphabet spells it (only ASCII stays itself)."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word))


def main() -> None:
    from training import tiny_pretrain  # it imports this module

    parser = argparse.ArgumentParser(description="Rebuild the weights of the tiny policy.")
    parser.add_argument("output", type=Path, help="folder for model.safetensors and recipe.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, words = new_model(arguments.seed), tokenizer()
    records = tiny_pretrain.pretrain(model, words, seed=arguments.seed)
    model.eval()
    accuracy = tiny_pretrain.matching_accuracy(model, words, seed=arguments.seed + 1)
    save_seed(model, arguments.output, {"seed": arguments.seed, "letter_accuracy": accuracy, "log": records})
    print(f"letter accuracy given the name: {accuracy:.3f} (512 fresh questions)")


def save_seed(model: torch.nn.Module, folder: Path, recipe: dict) -> None:
    """Write the weights of the language part in bfloat16, and how they came about."""
    folder.mkdir(parents=True, exist_ok=True)
    learned = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if ".visual." not in name and name != "lm_head.weight"
    }
    save_file(learned, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")


if __name__ == "__main__":
    main()
