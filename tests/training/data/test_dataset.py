"""What the trainer is shown: letters that cannot be memorised, questions in a reproducible order."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks.build_mcq import build_mcq
from tasks.language.prompts import LETTERS
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.pixels import Decoder
from tests.conftest import mcq_arguments, run_stage, settings_of
from training.data.dataset import Questions, permute, question_order
from training.settings import TrainSettings


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
    run_stage(build_mcq, out, **mcq_arguments(rollouts))
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
        settings_of(TrainSettings, order="easy")


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


class Counting(Decoder):
    """Notes what it decodes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __call__(self, data):
        self.count += 1
        return super().__call__(data)


def test_the_copies_of_a_group_share_one_picture_that_is_decoded_once(mcq, rollouts):
    decode = Counting()
    questions = Questions([mcq], [rollouts.card], "brief", seed=0, decode=decode)
    rows = questions.rows(6)
    first, again = (rows.__getitems__([0, 0, 0, 1, 1, 1]) for _ in range(2))
    assert decode.count == 2, "nor once more when a trainer asks for its batch again"
    assert len({id(row["image"]) for row in first + again}) == 2
    assert [row["mcq_id"] for row in first] == [rows[i]["mcq_id"] for i in (0, 0, 0, 1, 1, 1)]
    frozen = {row["mcq_id"]: row["image"]["bytes"] for row in shards.read(mcq, "mcq").to_pylist()}
    for row in [*rows, *questions.further(3, 0)]:
        whole = Image.open(io.BytesIO(frozen[row["mcq_id"]])).convert("RGB")
        assert row["image"].tobytes() == whole.tobytes(), row["mcq_id"]


def test_a_use_of_a_question_takes_no_copy_of_its_image(mcq, rollouts):
    cache = rollouts.root / "cache"
    questions = Questions([mcq], [rollouts.card], "brief", seed=0, cache=cache)
    before = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    rows = questions.rows(20 * len(questions.frozen))
    assert rows[0]["image"].size == (84, 84)
    after = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    assert after < 2 * before


def test_further_questions_depend_on_the_occasion_alone(mcq, rollouts):
    questions = Questions([mcq], [rollouts.card], "brief", seed=0)
    drawn = [[row["mcq_id"] for row in questions.further(4, n)] for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4
    assert len(questions.further(5 * len(questions.frozen), 3)) == 5 * len(questions.frozen)
