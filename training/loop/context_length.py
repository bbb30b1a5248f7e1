"""How long vLLM's context must be inside the trainer: the longest prompt and a whole completion.

Left to itself vLLM makes room for the longest context that the model knows, 128,000 positions of a
Qwen2.5-VL, of which GRPO on questions with one image uses a hundredth.
"""

from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

from PIL import Image

from tasks.language import prompts
from tasks.runtime.errors import StageError
from training.data.dataset import Questions
from training.loop.validation import Sample, Watch
from training.resources.gpu_memory import longest_prompt

# Permuted options may be cut into tokens a little differently, and scaled pictures into patches.
SPARE, MULTIPLE = 32, 128
Size = tuple[int, int]


def set_context(config: Any, prompt: int) -> None:
    """Set `vllm_max_model_length` of a colocated vLLM, where the user did not.

    `prompt` is the longest one's number of tokens. Raises StageError when what the user set does not
    hold it and a completion.
    """
    if not config.use_vllm or config.vllm_mode != "colocate":
        return
    needed = prompt + config.max_completion_length
    given = config.vllm_max_model_length
    if given is None:
        config.vllm_max_model_length = -(-(needed + SPARE) // MULTIPLE) * MULTIPLE
    elif given < needed:
        raise StageError(
            f"[Train] trl: vllm_max_model_length = {given} does not hold the longest prompt of "
            f"{prompt} tokens and a completion of {config.max_completion_length}; set it to "
            f"{needed} or more, or leave it out"
        )


def longest_row(
    questions: Questions, watch: Watch | None, processor: Any
) -> tuple[dict[str, Any], int]:
    """A row of the longest text and the image of most tokens, of all that are asked, and its tokens.

    Of every question and of the val images that are watched; no image is decoded but the few that
    may be the largest.
    """
    samples = watch.samples if watch else []
    texts = list({*_texts(questions), *(watch.texts if watch else [])})
    lengths = [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]
    text = texts[lengths.index(max(lengths))]
    places: dict[Size, int | Sample] = {_size(sample.image): sample for sample in samples}
    places |= _sizes(questions)
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


def _sizes(questions: Questions) -> dict[Size, int]:
    """Each (width, height) among the images -> the number of a question that has it."""
    return {_size(row["image"]["bytes"]): number for number, row in enumerate(questions.encoded)}


def _size(encoded: bytes) -> Size:
    with Image.open(BytesIO(encoded)) as image:  # reads the header alone
        return image.size


def _largest(sizes: Iterable[Size], processor: Any) -> set[Size]:
    """Sizes among which is that of most image tokens."""
    known = list(sizes)
    found = {max(known, key=measure) for measure in MEASURES}
    if hasattr(processor, "_get_num_multimodal_tokens"):
        asked = [(height, width) for width, height in known]
        counts = processor._get_num_multimodal_tokens(image_sizes=asked)["num_image_tokens"]
        found.add(known[counts.index(max(counts))])
    return found


# Where a processor cannot tell how many tokens an image has, one of the extremes has most.
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
