"""The tiny embedded policy: a Qwen2.5-VL of under two million parameters, built here.

It stands in for a real vision-language model where there is neither GPU nor network, and loads
like one: `AutoModelForImageTextToText`, `AutoProcessor`, vLLM. It starts untrained, or as the policy
in `training/base_policy` (see `training/make_base_policy.py`), and `training/sft.py` teaches it.

Its vocabulary has a fixed size: bytes, the words of the prompts, and slots for the words of a
card's class names, so that one recipe serves every dataset. What does not fit is spelt in bytes.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
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

from tasks.language.prompts import LETTERS
from training.settings import EMBEDDED

SHIPPED = Path(__file__).parent.parent / "base_policy"  # what `model = embedded` stands for
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
# Words of the prompts and of the taught completions; one that is missing is spelt in bytes.
_PROSE = """
    What of is this It one these Think between and Then give name letter or by option looks like
    user assistant system First reason step describe the traits you can see what they speak for
    most likely say which visible tell options apart them image shows exactly
"""
WORDS = tuple(_PROSE.split())

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
    vocabulary = {
        piece: index for index, piece in enumerate([*fixed, *taken, *slots[len(taken) :]])
    }
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
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            # 1 / sqrt(hidden size): at the usual 0.02 so narrow a model hardly attends at first.
            "initializer_range": 0.088,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 6, 6],
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
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained policy and its processor, with `words` in the vocabulary's slots."""
    return new_model(seed), processor(words, min_pixels=min_pixels, max_pixels=max_pixels)


def embedded(
    words: Iterable[str], *, min_pixels: int = IMAGE_SIDE**2, max_pixels: int = IMAGE_SIDE**2
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The embedded policy in float32 and its processor, with `words` in the slots that are free."""
    vocabulary = PreTrainedTokenizerFast.from_pretrained(SHIPPED).get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    fixed = {*LETTERS, *WORDS}
    known = [piece[1:] for piece in pieces if piece[0] == "Ġ" and "<slot" not in piece]
    known = [word for word in known if word and word not in fixed]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(SHIPPED, dtype=torch.float32)
    every = dict.fromkeys([*known, *words])
    return model, processor(every, min_pixels=min_pixels, max_pixels=max_pixels)


def source(model: str) -> str:
    """Where a model is loaded from: `embedded` stands for the folder of that policy."""
    return str(SHIPPED) if model == EMBEDDED else model


def save(model: torch.nn.Module, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Write a policy folder that transformers and vLLM load."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _to_bytes(word: str) -> str:
    """A word as the byte-level alphabet spells it (only ASCII stays itself)."""
    return "".join(
        piece
        for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)
    )
