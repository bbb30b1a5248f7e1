"""Loads a policy's processor for training, and the tokens that end its answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from tasks.engines import base
from tasks.engines.policies import check_words
from tasks.language import prompts
from tasks.runtime.errors import StageError


def load_processor(policy: Path | str, **options: Any) -> Any:
    """The policy's processor, padding on the left.

    Prompts of different lengths with images break the 3-D rotary index when padded on the right.
    """
    processor = base.load_processor(policy, **options)
    processor.tokenizer.padding_side = "left"
    return processor


def check(processor: Any, cards: Sequence[Any], style: str = "brief") -> None:
    """Raise StageError where its chat template cannot ask a question, or reads a card's word as a mark.

    Also where the template begins a thought and the prompt style asks for none.
    """
    prompts.rendered(processor, prompts.chat("?"))
    added = processor.tokenizer.added_tokens_decoder.values()
    for card in cards:
        check_words([token.content for token in added if token.special], card)
    if style == "direct" and prompts.opening(processor):
        raise StageError(
            f"the policy's chat template begins every answer with {prompts.THINK}, and the prompt style "
            "direct asks for no thought; take another style or method, or a policy that need not think"
        )


def sized_processor(model: str, min_pixels: int, max_pixels: int) -> Any:
    """The processor of a model, which scales images to an area between two bounds in pixels.

    Prints a line where the model has a fixed image size and ignores the bounds.
    """
    processor = load_processor(model, min_pixels=min_pixels, max_pixels=max_pixels)
    size = getattr(processor.image_processor, "size", None) or {}
    if (size.get("shortest_edge"), size.get("longest_edge")) != (min_pixels, max_pixels):
        print(
            f"base_policy: {model} has an image size of its own; [BasePolicy] min_pixels and "
            "max_pixels do nothing",
            flush=True,
        )
    return processor


def end_tokens(policy: Path) -> list[int]:
    """The ids of the policy's end tokens, from its generation config; empty without one."""
    try:
        ends = GenerationConfig.from_pretrained(policy).eos_token_id
    except OSError:  # the folder has none
        return []
    return [ends] if isinstance(ends, int) else list(ends or [])
