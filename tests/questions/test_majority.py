"""Questions whose answer is the majority vote: no label decides what is asked, or what is right."""

from tasks.language.prompts import LETTERS
from tests.questions.test_options import BASE, OF, PAIRS, build, options


def answers_of(questions: list[list[dict]]) -> dict[str, str]:
    rows = [row for shard in questions for row in shard]
    return {r["image_id"]: r["options"][LETTERS.index(r["answer_letter"])] for r in rows}


def test_the_majority_can_be_the_answer_and_its_mistakes_are_counted(tmp_path):
    _, questions, stats = build(PAIRS, OF, tmp_path, answer_from="majority")
    rows = [row for shard in questions for row in shard]
    assert answers_of(questions) == {"a": "Indigo Bunting", "b": "House Wren", "d": "Green Jay"}
    assert not any(row["truth_injected"] for row in rows)
    assert stats["answer_differs_from_label"] == 3


def test_the_majority_needs_no_labels(tmp_path):
    labels = dict.fromkeys(PAIRS, -1)
    told, questions, stats = build(PAIRS, labels, tmp_path, answer_from="majority")
    asked = {row["image_id"]: row for shard in questions for row in shard}
    assert set(asked) == {"a", "b", "d"}
    row = asked["a"]
    assert row["options"][LETTERS.index(row["answer_letter"])] == "Indigo Bunting"
    assert stats["answer_differs_from_label"] == 0
    assert {row["outcome"] for row in told} == {"kept", "truth_only"}
    _, _, stats = build(PAIRS, labels, tmp_path)
    assert stats["outcomes"] == {"no_label": 7}


def test_other_labels_make_the_same_questions(tmp_path):
    """With each base class taken for another, only the count of mistakes differs."""
    told, before, _ = build(PAIRS, OF, tmp_path, answer_from="majority")
    other = {image: (label + 1) % len(BASE) for image, label in OF.items()}
    assert set(other.values()) == set(OF.values()), "the same classes are base"
    again, after, _ = build(PAIRS, other, tmp_path, answer_from="majority")
    asked = [
        [row | {"label_differs": None} for shard in q for row in shard] for q in (before, after)
    ]
    assert asked[0] == asked[1]
    assert [row["outcome"] for row in told] == [row["outcome"] for row in again]


def test_a_name_that_is_no_class_is_never_the_answer(tmp_path):
    said = {"x": ["Common Loon"] * 3 + ["Blue Jay"] * 2 + ["Green Jay"], "y": ["Common Loon"]}
    rules = {"answer_from": "majority", "vocabulary": "open"}
    told, questions, _ = build(said, {"x": 2, "y": 3}, tmp_path, **rules)
    assert answers_of(questions) == {"x": "Blue Jay"}
    assert options(questions, "x")["Common Loon"] == "policy", "but a wrong option"
    assert [row["outcome"] for row in told] == ["kept", "no_candidates"]
