"""The length of a round in passes over its questions, and a mix cut to a number of questions."""

import math
from collections import Counter

import pytest

from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage, settings_of
from tests.training.test_grpo import arguments, frozen  # noqa: F401  a fixture
from training.data.dataset import sample
from training.settings import TrainSettings


def in_epochs(**changed) -> TrainSettings:
    return settings_of(TrainSettings, **{"steps": 0, "questions_per_step": 6} | changed)


@pytest.mark.parametrize(
    ("epochs", "questions", "steps"),
    [
        (1.5, 1600, 400),
        (1.6, 1504, 402),
        (1.0, 2400, 400),
        (0.001, 10, 1),
        (0.1, 180, 3),
        (3, 7, 4),
    ],
)
def test_steps_are_those_that_the_epochs_come_to(epochs, questions, steps):
    settings = in_epochs(epochs=epochs).with_steps(questions)
    assert (settings.steps, settings.epochs) == (steps, 0)


def test_epochs_are_of_the_questions_that_are_kept():
    assert in_epochs(epochs=1.0, max_questions=2400).with_steps(9999).steps == 400
    assert in_epochs(epochs=1.0, max_questions=2400).with_steps(1200).steps == 200


def test_steps_stay_as_they_are():
    settings = settings_of(TrainSettings, steps=7)
    assert settings.with_steps(1000) == settings


@pytest.mark.parametrize("changed", [{"steps": 0}, {"epochs": 2.0}])
def test_exactly_one_of_steps_and_epochs_is_set(changed):
    with pytest.raises(StageError, match=r"\[Train\] steps and epochs: exactly one"):
        settings_of(TrainSettings, **changed)


def test_a_mix_keeps_of_each_set_in_proportion_to_its_number_of_questions():
    sizes = [
        1605,
        751,
        587,
        2181,
        1263,
    ]  # about as many as the published runs keep of the five sets
    ids = [f"set{number}/{i}" for number, size in enumerate(sizes) for i in range(size)]
    picked = sample(ids, sizes, 2400, seed=0)
    assert len(picked) == len(set(picked)) == 2400
    assert picked == sorted(picked)
    kept = Counter(ids[i].split("/")[0] for i in picked)
    for number, size in enumerate(sizes):
        assert abs(kept[f"set{number}"] - 2400 * size / sum(sizes)) < 1
    assert sample(ids, sizes, 2400, seed=0) == picked
    assert sample(ids, sizes, 2400, seed=1) != picked


def test_of_equal_remainders_the_first_sets_keep_one_more():
    ids = [str(i) for i in range(9)]
    picked = sample(ids, [3, 3, 3], 4, seed=0)
    assert [sum(low <= i < low + 3 for i in picked) for low in (0, 3, 6)] == [2, 1, 1]


@pytest.mark.model
def test_a_round_takes_the_steps_of_its_epochs_over_the_questions_kept(frozen, tmp_path):
    from training.sft_baseline import sft_baseline

    built = shards.count_rows(frozen / "mcq", "mcq")
    kept = built - 5
    given = arguments(frozen, method="sft", steps=0, epochs=0.2, questions_per_step=8)
    given |= {"micro_batch_size": 8, "max_questions": kept, "watch_every": 0, "rounds": 1}
    (tmp_path / "out").mkdir()
    run_stage(sft_baseline, tmp_path / "out", **given)
    log = shards.read(tmp_path / "out", "train_log").to_pylist()
    assert log[-1]["step"] == math.ceil(0.2 * kept / 8)
    (tmp_path / "two").mkdir()
    with pytest.raises(StageError, match=r"epochs = 0.2 does not go with carry_over over 2 rounds"):
        run_stage(sft_baseline, tmp_path / "two", **{**given, "rounds": 2})
