"""Lessons: what they say is true of the options, their letters fit, and only captions are careless."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_cards.beetles import SPECIES, TRAITS
from tasks.language import answers
from training.data import lessons
from training.data.sft_examples import Wording
from training.loop.supervised import collate
from training.make_base_policy import vocabulary, wording
from training.model import tiny_policy

WORDING = Wording("beetle", "species", "brief")


@given(st.integers(0, 9999))
def test_a_question_is_answered_by_the_letter_of_the_nearest_option(seed):
    rng = random.Random(seed)
    options = lessons.some_options(rng)
    look = lessons.mistaken(lessons.LOOKS[rng.choice(options)], rng)
    example = lessons.weighing(None, look, options, rng, WORDING)
    assert answers.parse(example.completion).well_formed
    assert example.completion.startswith(example.given)
    chosen = answers.choose(example.completion, options)
    assert chosen.status == "letter"
    apart = [
        sum(a != b for a, b in zip(look, lessons.LOOKS[name], strict=True)) for name in options
    ]
    assert apart[chosen.index] == min(apart)
    told = example.completion.split("</think>")[0].split(". ")[1:]
    marks = [part.rstrip(".").split()[2:] for part in told]
    assert [sum(mark != lessons.SAME for mark in row) for row in marks] == apart


def test_a_name_follows_from_a_true_description():
    for name, look in SPECIES:
        example = lessons.naming(lessons.grey(), name, WORDING)
        assert example.given == f"<think>{' '.join(look)}."
        assert answers.parse(example.completion).answer == name


def test_careless_captions_mix_up_words_of_one_kind_in_the_shares_that_are_told():
    rng = random.Random(0)
    kind = {word: trait for trait, words in TRAITS.items() for word in words}
    assert all(kind[word] == kind[other] for word, (other, _) in lessons.CARELESS.items())
    look = ("teal", "round", "banded", "pink", "rusty")
    rows = [lessons.careless(look, rng) for _ in range(4000)]
    for place, word in enumerate(look):
        other, share = lessons.CARELESS.get(word, (word, 0.0))
        said = [row[place] for row in rows]
        assert set(said) <= {word, other}
        assert said.count(other) / len(said) == pytest.approx(
            share if other != word else 1, abs=0.03
        )


def test_every_word_of_a_lesson_is_one_token_and_only_what_is_taught_carries_loss():
    processor = tiny_policy.processor(vocabulary())
    rng = random.Random(1)
    look = lessons.random_look(rng)
    options = [name for name, _ in SPECIES[:4]]
    batch = [
        lessons.seeing(lessons.grey(), look, wording()),
        lessons.weighing(None, look, options, rng, wording()),
        lessons.naming(lessons.grey(), options[0], wording()),
    ]
    inputs = collate(processor, batch)
    decode = processor.tokenizer.decode
    for row, labels, example in zip(inputs["input_ids"], inputs["labels"], batch, strict=True):
        taught = row[labels != -100]
        end = "" if example.unfinished else processor.tokenizer.eos_token
        said = example.given + decode(taught)  # decoding a part drops the space before it
        assert said.replace(" ", "") == (example.completion + end).replace(" ", "")
    assert int((inputs["labels"][0] != -100).sum()) == 1 + len(look) + 1
    assert int((inputs["labels"][2] != -100).sum()) == 6, (
        "</think><answer>genus epithet</answer>, end"
    )
