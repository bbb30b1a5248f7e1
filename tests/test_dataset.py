"""What the trainer is shown: letters that cannot be memorised, questions in a reproducible order."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import shards
from tasks.build_mcq import build_mcq
from tasks.prompts import LETTERS
from tasks.run import StageError
from tests.conftest import mcq_arguments
from training.dataset import permute, question_order, training_rows


@given(st.integers(0, 4), st.integers(0, 50), st.text(max_size=8))
def test_the_answer_follows_its_option(answer, epoch, mcq_id):
    options = ["crow", "gull", "kite", "wren", "rook"]
    shown, where = permute(options, answer, 0, epoch, mcq_id)
    assert sorted(shown) == sorted(options)
    assert shown[where] == options[answer]


def test_letters_change_from_epoch_to_epoch_and_are_spread_evenly():
    places = Counter(permute(list("abcde"), 2, 0, epoch, "q")[1] for epoch in range(500))
    assert set(places) == {0, 1, 2, 3, 4}
    assert min(places.values()) > 60


def test_the_same_seed_epoch_and_question_give_the_same_letters():
    assert permute(list("abcde"), 2, 7, 3, "q") == permute(list("abcde"), 2, 7, 3, "q")
    orders = {tuple(permute(list("abcde"), 2, seed, 3, "q")[0]) for seed in range(20)}
    assert len(orders) > 5


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 3))
def test_every_question_is_used_equally_often_within_one(questions, uses, seed):
    order = question_order(questions, uses, seed, 0)
    assert len(order) == uses
    assert len(set(order)) == uses, "a question comes once an epoch"
    used = Counter(question for question, _ in order)
    assert max(used.values()) - min(used[q] for q in range(questions)) <= 1


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 3), st.randoms())
def test_a_curriculum_asks_the_same_questions_from_easy_to_hard(questions, uses, seed, rng):
    easiness = np.array([rng.choice([-1.0, 0.0, 0.25, 1.0]) for _ in range(questions)])
    shuffled = question_order(questions, uses, seed, 0)
    order = question_order(questions, uses, seed, 0, easiness)
    assert Counter(order) == Counter(shuffled)
    for epoch in {epoch for _, epoch in order}:
        levels = [easiness[question] for question, of in order if of == epoch]
        assert levels == sorted(levels, reverse=True)


def test_the_curriculum_follows_the_margins_in_the_shards(rollouts):
    out = rollouts.root / "mcq"
    out.mkdir()
    build_mcq(out, **mcq_arguments(rollouts))
    frozen = {row["mcq_id"]: row["margin"] for row in shards.read(out, "mcq").to_pylist()}
    shown = {"num_uses": len(frozen), "seed": 0, "round_": 0}
    margins = {
        order: [
            frozen[row["mcq_id"]]
            for row in training_rows([out], [rollouts.card], "brief", order=order, **shown)
        ]
        for order in ("shuffled", "curriculum")
    }
    assert margins["curriculum"] == sorted(margins["shuffled"], reverse=True) != margins["shuffled"]
    with pytest.raises(StageError, match=r"\[Train\] order .* got 'easy'"):
        training_rows([out], [rollouts.card], "brief", order="easy", **shown)


def test_rows_hold_what_trainer_and_rewards_need(rollouts):
    out = rollouts.root / "mcq"
    out.mkdir()
    build_mcq(out, **mcq_arguments(rollouts))
    count = shards.read(out, "mcq").num_rows
    cache = rollouts.root / "cache"
    rows = training_rows(
        [out], [rollouts.card], "brief", num_uses=2 * count, seed=0, round_=0, cache=cache
    )
    assert rows.cache_files
    assert all(cache in Path(file["filename"]).parents for file in rows.cache_files)
    assert len(rows) == 2 * count
    seen = {}
    for row in rows:
        text = row["prompt"][0]["content"]
        for letter, option in zip(LETTERS, row["options"], strict=False):
            assert f"{letter}. {option}" in text
        truth = row["options"][LETTERS.index(row["answer_letter"])]
        assert seen.setdefault(row["mcq_id"], truth) == truth, "the answer changed with the letters"
        assert row["image"].size == (84, 84)
    assert len(seen) == count


@pytest.mark.parametrize("style", ["brief", "stepwise"])
def test_prompts_ask_in_the_style_set(rollouts, style):
    from tasks.prompts import mcq_question, open_question

    assert "<think>" in open_question("bird", "species", style=style)
    listed = open_question("bird", "species", style=style, names=["Crow", "Gull"])
    assert "Crow; Gull" in listed
    assert "A. Crow\nB. Gull\n" in mcq_question("bird", "species", ["Crow", "Gull"], style=style)
    with pytest.raises(ValueError, match="prompt_style"):
        open_question("bird", "species", style="loud")
