"""What the report says of changes: which rows it counts, against counts by hand."""

import pytest

from tasks.evaluation import changes
from tasks.tables import schemas, shards
from tests.questions.test_refresh import write_log

CLASSES = ("Amber", "Beryl", "Coral")


def row(image_id: str, label: int, class_id: int, mode: str = "one_step", **more) -> dict:
    """A prediction; `letter` and the like as given."""
    placed = {"image_id": image_id, "label": label, "group": "novel" if label == 2 else "base"}
    answered = {"class_id": class_id, "correct": class_id == label, "mode": mode}
    return placed | answered | {"options": [], "letter": "", "truth_letter": ""} | more


def choice(letter: str, truth: str, options: int, mode: str = "mcq") -> dict:
    found = {"letter": letter, "truth_letter": truth, "options": [""] * options}
    return row("a", 0, 0, mode, **found)


def test_a_liking_for_a_letter_shows_and_questions_without_a_choice_do_not_count():
    rows = [choice("A", truth, 2) for truth in "AB" * 30]
    rows += [choice("", "B", 2)] * 20 + [choice("", "A", 1)] * 50 + [choice("", "", 0)] * 5
    rows += [choice("B", "B", 2, mode="two_step")] * 99
    found = changes.letters(rows)
    assert (found["mode"], found["questions"], found["no_letter"]) == ("mcq", 80, 0.25)
    first, second = found["letters"]["A"], found["letters"]["B"]
    assert (first["chosen"], first["expected"], first["bias"]) == (1.0, 0.5, 0.5)
    assert (first["right"], second["right"]) == (30 / 80, 50 / 80)
    assert first["interval"] == pytest.approx([0.4398, 0.5], abs=1e-4)  # Wilson, less 0.5
    assert second["bias"] == -0.5
    assert found["p"] < 1e-9


def test_a_policy_that_reads_the_options_likes_no_letter():
    found = changes.letters([choice(letter, letter, 3) for letter in "ABC" * 20])
    assert found["p"] == 1.0
    for letter in found["letters"].values():
        low, high = letter["interval"]
        assert low < 0 < high
        assert letter["bias"] == pytest.approx(0)


def test_no_letters_no_bias():
    assert changes.letters([row("a", 0, 0)]) == {}
    assert changes.letters([choice("", "A", 3)]) == {}


def test_sureness_is_of_the_majority_where_there_is_one(tmp_path):
    rows = [row(str(i), 0, 0 if i < 3 else 1, "majority", vote_share=0.6) for i in range(4)]
    rows += [row(str(i), 0, 0, "majority", vote_share=1.0) for i in range(4, 6)]
    rows += [row("6", 0, -1, "majority", vote_share=0.0), row("0", 0, 1, vote_share=0.1)]
    whole = [r | {"completion": "", "answer": "", "status": ""} for r in rows]
    shards.write(tmp_path / "predictions.parquet", whole, schemas.predictions(CLASSES))
    found = changes.calibration(shards.read(tmp_path, "predictions").to_pylist())
    assert [(b["images"], b["accuracy"]) for b in found["bins"]] == [(4, 0.75), (2, 1.0)]
    assert found["bins"][0]["vote_share"] == pytest.approx(0.6)
    assert found["error"] == pytest.approx(4 * 0.15 / 6)
    assert found["images"] == 6
    assert changes.calibration([row("a", 0, 0)]) == {}


def test_confusions_pair_images_by_id_and_name_classes():
    before = [row("a", 0, 1), row("b", 0, 1), row("c", 1, 1), row("d", 2, -1)]
    after = [row("d", 2, 0), row("c", 1, 1), row("b", 0, 1), row("a", 0, 0)]
    after += [row("a", 0, 2, "majority")]
    assert changes.confusions(before, after, "one_step", CLASSES) == {
        "mode": "one_step",
        "resolved": [{"truth": "Amber", "answer": "Beryl", "before": 2, "after": 1}],
        "introduced": [{"truth": "Coral", "answer": "Amber", "before": 0, "after": 1}],
        "gone": 1,
        "new": 1,
    }


def test_classes_are_counted_by_group_and_evaluation():
    before = [row("a", 2, 2), row("b", 1, 0), row("c", 1, 1)]
    after = [row("b", 1, 1), row("c", 1, 1), row("a", 2, 0)]
    assert changes.by_class([before, after], "one_step", CLASSES) == [
        {"class": "Beryl", "group": "base", "right": [1, 2], "images": 2},
        {"class": "Coral", "group": "novel", "right": [1, 0], "images": 1},
    ]


def test_solved_questions_are_those_whose_last_answers_were_all_right(tmp_path):
    uses = {"a": [(1, 0.0), (4, 1.0), (4, 1.0)], "b": [(4, 1.0), (4, 0.0)], "c": [(2, 2.0)]}
    log = write_log(tmp_path / "log", uses, name="difficulty_weighted")
    assert changes.solved(log) == {"asked": 3, "solved": 2}
    assert changes.solved(write_log(tmp_path / "other", uses, name="polite")) == {}
    assert changes.solved(tmp_path / "nothing") == changes.solved(None) == {}
