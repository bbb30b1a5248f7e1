"""Sets vLLM's context length inside the trainer: the longest prompt plus a whole completion.

By default vLLM reserves the model's longest context, 128,000 positions for a Qwen2.5-VL. GRPO on
questions with one image uses a hundredth of that.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from tasks.language import prompts
from tasks.runtime.errors import StageError
from tasks.tables.pixels import picture_size
from training.data.dataset import Questions
from training.loop.validation import Sample, Watch
from training.resources.gpu_memory import longest_prompt

# Spare tokens: permuted options may be tokenised a little differently, and scaled pictures may have
# other numbers of patches. The length is a multiple of MULTIPLE.
SPARE, MULTIPLE = 32, 128
Size = tuple[int, int]


def set_context(config: Any, prompt: int) -> None:
    """Set `vllm_max_model_length` of a colocated vLLM, unless the user set it.

    `prompt` is the number of tokens of the longest prompt. Raises StageError when the user's value is
    too small for that prompt and a whole completion.
    """
    if not config.use_vllm or config.vllm_mode != "colocate":
        return
    needed = prompt + config.max_completion_length
    length = config.vllm_max_model_length
    if length is None:
        config.vllm_max_model_length = -(-(needed + SPARE) // MULTIPLE) * MULTIPLE
    elif length < needed:
        raise StageError(
            f"[Train] trl: vllm_max_model_length = {length} does not hold the longest prompt of "
            f"{prompt} tokens and a completion of {config.max_completion_length}; set it to "
            f"{needed} or more, or leave it out"
        )


def longest_row(
    questions: Questions, watch: Watch | None, processor: Any
) -> tuple[dict[str, Any], int]:
    """A row with the longest text and the largest image, and its length in tokens.

    Both are taken from all questions and all val images; the largest image has the most tokens. Only
    the few images that may be the largest are decoded.
    """
    samples = watch.samples if watch else []
    texts = list({*_texts(questions), *(watch.texts if watch else [])})
    lengths = [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]
    text = texts[lengths.index(max(lengths))]
    places: dict[Size, int | Sample] = {picture_size(sample.image): sample for sample in samples}
    places |= {size: number for number, size in enumerate(questions.sizes)}
    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": _image(questions, places[size])}
        for size in _largest(places, processor)
    ]
    counts = [longest_prompt(processor, [row]) for row in rows]
    return rows[counts.index(max(counts))], max(counts)


def _texts(questions: Questions) -> Iterator[str]:
    columns = ["image_id", "question", "options"]
    for row in questions.frozen.select_columns(columns):
        card = questions.cards[row["image_id"].split("/")[0]]
        yield (
            row["question"]
            if questions.style is None
            else prompts.mcq_question(card.noun, card.kind, row["options"], style=questions.style)
        )


def _largest(sizes: Iterable[Size], processor: Any) -> set[Size]:
    """Candidates for the size with the most image tokens."""
    known = list(sizes)
    largest = {max(known, key=measure) for measure in MEASURES}
    if hasattr(processor, "_get_num_multimodal_tokens"):
        heights_first = [(height, width) for width, height in known]
        counts = processor._get_num_multimodal_tokens(image_sizes=heights_first)["num_image_tokens"]
        largest.add(known[counts.index(max(counts))])
    return largest


# Some processors cannot count an image's tokens by its size. Then one of these extremes has the most.
MEASURES = (
    lambda size: size[0] * size[1],
    lambda size: size[0],
    lambda size: size[1],
    lambda size: size[0] / size[1],
    lambda size: size[1] / size[0],
)


def _image(questions: Questions, place: int | Sample) -> Image.Image:
    encoded = questions.encoded[place]["image"]["bytes"] if isinstance(place, int) else place.image
    return questions.decode(encoded)
