"""Room in the context of a colocated vLLM: for the longest prompt of a run and a completion."""

from io import BytesIO
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from data_cards import load
from tasks.runtime.errors import StageError
from tasks.tables.pixels import Decoder
from training.data.dataset import Questions, training_row
from training.loop.context_length import longest_row, set_context
from training.loop.validation import Sample, Watch
from training.model import tiny_policy
from training.resources.gpu_memory import longest_prompt

CARD = load("beetles")
# The largest image has not the most tokens where the processor scales it down: 252 x 84 has 27.
SIZES = [(84, 84), (84, 112), (252, 84), (300, 300), (90, 84)]


def encoded(size) -> bytes:
    Picture.new("RGB", size).save(buffer := BytesIO(), "PNG")
    return buffer.getvalue()


def frozen(options: int = 4) -> Questions:
    """Questions of which the longest text and the image of most tokens are not the same one's."""
    made = Questions.__new__(Questions)
    names = CARD.classes
    rows = [
        {
            "image_id": f"beetles/{n}", "mcq_id": f"q{n}", "question": f"What is number {n}?",
            "options": names[: options + 3 * (n == 1)], "answer_letter": "A", "truth_share": 0.5,
            "option_class_ids": list(range(options + 3 * (n == 1))),
            "image": {"bytes": encoded(size), "path": None},
        }
        for n, size in enumerate(SIZES)
    ]  # fmt: skip
    text, number = Value("string"), Value("int64")
    features = Features({
        "image_id": text, "mcq_id": text, "question": text, "options": List(text),
        "answer_letter": text, "truth_share": Value("float64"), "option_class_ids": List(number),
        "image": Image(),
    })  # fmt: skip
    whole = Dataset.from_list(rows, features=features)
    made.encoded = whole.select_columns("image").cast_column("image", Image(decode=False))
    made.frozen, made.decode = whole.remove_columns("image"), Decoder()
    made._pictures, made.sizes = {}, SIZES
    made.cards, made.style, made.seed = {"beetles": CARD}, "brief", 0
    return made


@pytest.fixture(scope="module")
def processor():
    words = tiny_policy.slot_words(CARD.classes[:9])
    return tiny_policy.processor(words, min_pixels=56 * 56, max_pixels=28 * 28 * 27)


def config(**given):
    asked = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": None}
    return SimpleNamespace(**{**asked, "max_completion_length": 200, **given})


@pytest.mark.parametrize("told", [True, False])
def test_no_prompt_of_the_run_is_longer(processor, told, monkeypatch):
    """Every text with every image; also where the processor cannot tell tokens from sizes."""
    if not told:
        monkeypatch.delattr(type(processor), "_get_num_multimodal_tokens")
    questions = frozen()
    pictures = questions._read(range(len(SIZES)))
    rows = [
        training_row({**row, "image": picture, "epoch": 0}, CARD, "brief", 0)
        for row, picture in zip(questions.frozen, pictures, strict=True)
    ]
    each = [
        longest_prompt(processor, [{"prompt": a["prompt"], "image": b["image"]}])
        for a in rows
        for b in rows
    ]
    assert longest_row(questions, None, processor)[1] == max(each)
    assert max(each) > max(longest_prompt(processor, [row]) for row in rows)


def test_watched_images_count_as_well(processor):
    questions = frozen()
    questions.frozen = questions.frozen.select([0])
    questions.encoded, questions.sizes = questions.encoded.select([0]), SIZES[:1]
    small = longest_row(questions, None, processor)[1]
    watch = Watch([Sample("x", 0, 0, encoded((252, 84)))], [CARD], "brief", 1, 10)
    assert longest_row(questions, watch, processor)[1] == small + 27 - 9


def test_the_context_is_set_where_the_user_has_not_and_is_refused_where_it_is_too_short(processor):
    questions = frozen()
    needed = longest_row(questions, None, processor)[1] + 200
    given = config()
    set_context(given, needed - 200)
    assert needed + 32 <= given.vllm_max_model_length < needed + 32 + 128
    given = config(vllm_max_model_length=needed)
    set_context(given, needed - 200)
    assert given.vllm_max_model_length == needed
    with pytest.raises(
        StageError, match=f"vllm_max_model_length = {needed - 1} .* set it to {needed}"
    ):
        set_context(config(vllm_max_model_length=needed - 1), needed - 200)
    for other in ({"use_vllm": False}, {"vllm_mode": "server"}):
        set_context(given := config(**other), needed - 200)
        assert given.vllm_max_model_length is None
