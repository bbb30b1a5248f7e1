"""The curve from stored rollouts: what is known is counted, what was not asked is a range."""

import pytest

from tasks.evaluate import evaluate
from tasks.evaluation.budget_curve import budget_curve
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge_all
from tasks.tables import shards
from tests.conftest import evaluate_arguments, run_stage


def curve_of(made, modes: str, **changed):
    folder = made.root / "evaluate"
    folder.mkdir()
    run_stage(evaluate, folder, **evaluate_arguments(made, modes=modes, **changed))
    rows = shards.read(folder, "predictions").to_pylist()
    return folder, rows, {p["strategy"]: p for p in budget_curve(folder, rows, made.card)}


@pytest.fixture
def evaluated(split_set):
    split_set.folder, split_set.rows, split_set.curve = curve_of(
        split_set, "one_step majority two_step mcq", num_options=3
    )
    return split_set


def right(rows, mode, group):
    flags = [row["correct"] for row in rows if (row["mode"], row["group"]) == (mode, group)]
    return sum(flags) / len(flags)


def test_what_was_asked_is_what_the_evaluation_says(evaluated):
    for strategy, mode in (
        ("one step", "one_step"),
        ("majority of 20", "majority"),
        ("two steps, 3 options", "two_step"),
    ):
        point = evaluated.curve[strategy]
        assert point["known"] == 1.0
        for group in ("base", "novel"):
            expected = right(evaluated.rows, mode, group)
            assert point[group] == {"low": expected, "high": expected}
        low, high = point["harmonic_mean"]["interval"]
        assert low <= point["harmonic_mean"]["low"] <= high


def test_answers_are_counted(evaluated):
    asked = [r for r in evaluated.rows if r["mode"] == "two_step"]
    questions = sum(len(row["options"]) > 1 for row in asked) / len(asked)
    answers = {name: point["answers"] for name, point in evaluated.curve.items()}
    assert answers["one step"] == 1
    assert answers["majority of 8"] == 8
    assert answers["two steps, 3 options"] == pytest.approx(20 + questions)


def test_an_answer_that_was_not_asked_for_is_a_range_and_never_a_figure(evaluated):
    names = ClassNames(evaluated.card.classes, evaluated.card.aliases)
    votes = merge_all(evaluated.folder, names, set(range(40)))
    for k in (2, 5):
        point = evaluated.curve[f"two steps, {k} options"]
        assert point["known"] < 1
        assert "interval" not in point["harmonic_mean"]
        rows = [r for r in evaluated.rows if r["mode"] == "two_step" and r["group"] == "base"]
        offered = [
            row["label"] in [c.class_id for c in votes[row["image_id"]].candidates[:k]]
            for row in rows
        ]
        same = [len(votes[r["image_id"]].candidates[:k]) == len(r["options"]) for r in rows]
        low = sum(row["correct"] for row, known in zip(rows, same, strict=True) if known)
        high = low + sum(o for o, known in zip(offered, same, strict=True) if not known)
        assert point["base"]["low"] == pytest.approx(low / len(rows))
        assert point["base"]["high"] == pytest.approx(high / len(rows))


def test_without_thresholds_adaptive_is_shown_as_such(evaluated):
    assert "adaptive" not in evaluated.curve
    point = evaluated.curve["adaptive, thresholds not set"]
    assert 4 <= point["answers"] < 21
    full = evaluated.curve["two steps, 3 options"]
    assert point["base"]["low"] <= full["base"]["low"] + 0.2


def test_the_mode_adaptive_has_its_own_point(split_set):
    folder, rows, curve = curve_of(split_set, "two_step adaptive", instalments="4 8")
    used = shards.read(folder, "adaptive_counts").to_pylist()
    answers = [row["num_rollouts"] + (row["num_options"] > 1) for row in used]
    assert curve["adaptive"]["answers"] == pytest.approx(sum(answers) / len(answers))
    assert curve["adaptive"]["base"]["low"] == right(rows, "adaptive", "base")
    assert "adaptive, thresholds not set" not in curve


def test_without_full_samples_there_is_no_curve(split_set):
    assert curve_of(split_set, "one_step")[2] == {}
