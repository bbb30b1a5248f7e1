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
from training.dataset import Questions, permute, question_order


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


def ids(count: int) -> list[str]:
    return [f"few/train/{number}" for number in range(count)]


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 3))
def test_every_question_is_used_equally_often_within_one(questions, uses, seed):
    order = question_order(ids(questions), uses, seed)
    assert len(order) == uses
    assert len(set(order)) == uses, "a question comes once an epoch"
    used = Counter(question for question, _ in order)
    assert max(used.values()) - min(used[q] for q in range(questions)) <= 1


@given(st.integers(2, 40), st.integers(0, 3), st.data())
def test_a_question_keeps_its_place_when_others_go(questions, seed, data):
    """A refresh drops some questions; the rest are asked in the order they were asked in before."""
    kept = data.draw(st.sets(st.integers(0, questions - 1), min_size=1))
    whole = [ids(questions)[q] for q, _ in question_order(ids(questions), questions, seed)]
    left = [image_id for place, image_id in enumerate(ids(questions)) if place in kept]
    order = [left[q] for q, _ in question_order(left, len(left), seed)]
    assert order == [image_id for image_id in whole if image_id in set(left)]


def test_epochs_and_seeds_have_orders_of_their_own():
    order = [question for question, _ in question_order(ids(30), 90, 0)]
    epochs = [tuple(order[start : start + 30]) for start in (0, 30, 60)]
    other = tuple(question for question, _ in question_order(ids(30), 30, 1))
    assert len({*epochs, other}) == 4


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 3), st.randoms())
def test_a_curriculum_asks_the_same_questions_from_easy_to_hard(questions, uses, seed, rng):
    easiness = np.array([rng.choice([-1.0, 0.0, 0.25, 1.0]) for _ in range(questions)])
    shuffled = question_order(ids(questions), uses, seed)
    order = question_order(ids(questions), uses, seed, easiness)
    assert Counter(order) == Counter(shuffled)
    for epoch in {epoch for _, epoch in order}:
        levels = [easiness[question] for question, of in order if of == epoch]
        assert levels == sorted(levels, reverse=True)


@pytest.fixture
def mcq(rollouts) -> Path:
    out = rollouts.root / "mcq"
    out.mkdir()
    build_mcq(out, **mcq_arguments(rollouts))
    return out


def test_the_curriculum_follows_the_margins_in_the_shards(mcq, rollouts):
    frozen = {row["mcq_id"]: row["margin"] for row in shards.read(mcq, "mcq").to_pylist()}
    questions = Questions([mcq], [rollouts.card], "brief", seed=0)
    margins = {
        order: [frozen[row["mcq_id"]] for row in questions.rows(len(frozen), order)]
        for order in ("shuffled", "curriculum")
    }
    assert margins["curriculum"] == sorted(margins["shuffled"], reverse=True) != margins["shuffled"]
    with pytest.raises(StageError, match=r"\[Train\] order .* got 'easy'"):
        questions.rows(3, "easy")


def test_rows_hold_what_trainer_and_rewards_need(mcq, rollouts):
    frozen = {row["mcq_id"]: row for row in shards.read(mcq, "mcq").to_pylist()}
    count, cache = len(frozen), rollouts.root / "cache"
    rows = Questions([mcq], [rollouts.card], "brief", seed=0, cache=cache).rows(2 * count)
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
        assert truth == rollouts.card.classes[row["label"]]
        assert row["truth_share"] == pytest.approx(frozen[row["mcq_id"]]["truth_share"])
        assert row["card"] == "few"
        assert row["image"].size == (84, 84)
    assert len(seen) == count


def test_further_questions_depend_on_the_occasion_alone(mcq, rollouts):
    questions = Questions([mcq], [rollouts.card], "brief", seed=0)
    drawn = [[row["mcq_id"] for row in questions.further(4, n)] for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4
    assert len(questions.further(5 * len(questions.frozen), 3)) == 5 * len(questions.frozen)


@pytest.mark.parametrize("style", ["brief", "stepwise", "caption"])
def test_prompts_ask_in_the_style_set(rollouts, style):
    from tasks.prompts import mcq_question, open_question

    assert "<think>" in open_question("bird", "species", style=style)
    listed = open_question("bird", "species", style=style, names=["Crow", "Gull"])
    assert "Crow; Gull" in listed
    assert "A. Crow\nB. Gull\n" in mcq_question("bird", "species", ["Crow", "Gull"], style=style)
    with pytest.raises(ValueError, match="prompt_style"):
        open_question("bird", "species", style="loud")
