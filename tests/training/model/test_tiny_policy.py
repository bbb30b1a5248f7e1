"""The embedded policy: what its tokenizer promises, and what it is taught to say."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.language import answers, prompts
from training.data import sft_examples
from training.loop import supervised
from training.model import tiny_policy

NAMES = ["rose gold-belt", "rose cyan-belt", "crimson gold-belt", "teal coral-belt", "Łoś"]
WORDING = sft_examples.Wording("beetle", "species", "brief")


@pytest.fixture(scope="module")
def processor():
    words = tiny_policy.slot_words(["species", "beetle", *NAMES])
    return tiny_policy.processor(words)


def test_each_word_of_a_class_name_is_one_token(processor):
    assert len(processor.tokenizer("rose gold-belt")["input_ids"]) == 2
    assert len(processor.tokenizer("crimson coral-belt")["input_ids"]) == 2


def test_an_unknown_word_is_spelt_in_bytes_and_comes_back_whole(processor):
    ids = processor.tokenizer("an ornate jewel-belt")["input_ids"]
    assert len(ids) > 10
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "an ornate jewel-belt"


@given(st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_completions_survive_encoding_and_decoding(processor, thought, answer):
    text = prompts.completion(sft_examples.thought(thought), answer)
    ids = processor.tokenizer(text + "<|im_end|>")["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_letter_is_the_same_token_before_an_option_and_as_an_answer(processor):
    def ids(text):
        return processor.tokenizer(text)["input_ids"]

    for letter in "ABCDE":
        assert ids(f"\n{letter}. rose")[1] == ids(f"<answer>{letter}</answer>")[1]


def test_names_beyond_the_last_slot_are_spelt_and_not_lost():
    words = [f"word{i}" for i in range(2000)]
    tokenizer = tiny_policy.tokenizer(words)
    assert len(tokenizer) == tiny_policy.VOCABULARY
    assert len(tokenizer("word0")["input_ids"]) == 1
    assert tokenizer.decode(tokenizer("word1999")["input_ids"]) == "word1999"


@given(st.integers(0, 999), st.floats(0, 1))
def test_every_example_is_well_formed_and_right(seed, share):
    rng = random.Random(seed)
    name = rng.choice(NAMES)
    example = sft_examples.random_example(
        None, name, NAMES, rng, WORDING, question_share=share, max_options=4
    )
    assert answers.parse(example.completion).well_formed
    options = [line[3:] for line in example.question.splitlines() if line[1:3] == ". "]
    if options:
        assert len(set(options)) == len(options) <= 4
        chosen = answers.choose(example.completion, options)
        assert options[chosen.index] == name
    else:
        assert answers.parse(example.completion).answer == name


def test_only_the_completion_carries_loss(processor):
    image = Image.new("RGB", (32, 32))
    batch = [
        sft_examples.open_example(image, NAMES[0], WORDING),
        sft_examples.mcq_example(image, NAMES[1], NAMES[:3], WORDING),
    ]
    inputs = supervised.collate(processor, batch)
    for row, example in enumerate(batch):
        taught = inputs["input_ids"][row][inputs["labels"][row] != -100]
        text = processor.tokenizer.decode(taught, skip_special_tokens=True)
        assert text == example.completion
    images = (
        inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ).sum(1)
    assert images.tolist() == [9, 9], "a small photograph is scaled up to nine image tokens"


def test_equal_seeds_give_equal_weights():
    first, second = (tiny_policy.new_model(3).state_dict() for _ in range(2))
    assert all((first[key] == second[key]).all() for key in first)
    other = tiny_policy.new_model(4).state_dict()
    assert any((first[key] != other[key]).any() for key in first)
    assert sum(value.numel() for value in first.values()) < 5_000_000
