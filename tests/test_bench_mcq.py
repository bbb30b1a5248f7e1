"""The benchmark's comparison: what the first implementation's rules lose, and that ours do not."""

from tasks.language.class_names import ClassNames
from tests.bench.build_mcq import losses
from tests.bench.official_rules import official_rules
from tests.bench.synthetic import write_rollouts

BIRDS = ClassNames(["Black-footed Albatross", "Laysan Albatross", "Crow", "Gull"])


def test_a_respelt_truth_is_thought_absent_and_offered_twice():
    said = {"x": ["black-footed albatross"] * 3 + ["Crow"] * 2}
    found = official_rules(said, {"x": 0}, BIRDS, range(4), 0)
    assert (found.questions, found.truth_thought_absent, found.duplicate_options) == (1, 1, 1)


def test_names_of_no_class_take_the_places_of_classes():
    said = {
        "x": [*["Dodo"] * 5, *["Roc"] * 4, *["Moa"] * 4, *["Elf"] * 3, *["Ent"] * 3, "Crow", "Gull"]
    }
    found = official_rules(said, {"x": 2}, BIRDS, range(4), 0)
    assert (found.lost_candidates, found.candidates, found.questions) == (2, 2, 0)


def test_on_untidy_rollouts_ours_lose_nothing(tmp_path):
    write_rollouts(tmp_path / "rollouts", 300, 20)
    figures = {f["figure"]: f["value"] for f in losses(tmp_path / "rollouts", 300)}
    assert len(figures) == 8
    for name, value in figures.items():
        assert (value == 0) == name.endswith("ours"), name
