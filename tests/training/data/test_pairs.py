"""Pairs of questions: who is whose partner, that none is torn apart, and what both are paid."""

import itertools
from collections import Counter

import numpy as np
import pytest

from tasks.language.prompts import LETTERS
from tasks.questions.refresh import latest_rewards
from tasks.tables import schemas, shards
from tests.conftest import mcq_arguments, run_stage
from training.data.dataset import Place, Questions, question_order
from training.data.group_rewards import contrast_reward
from training.data.pairs import Pairs

SAID = "<think>x</think><answer>{}</answer>"


def question(number: int, truth: int, options: dict[int, int], card: str = "few") -> dict:
    """A question about a class; `options` are its class ids with their votes."""
    ids = list(options)
    return {
        "mcq_id": f"q{number}",
        "image_id": f"{card}/{number}",
        "option_class_ids": ids,
        "option_votes": list(options.values()),
        "answer_letter": LETTERS[ids.index(truth)],
        "truth_share": number / 10,
    }


def pairs(*rows: dict, seed: int = 0) -> Pairs:
    return Pairs({name: [row[name] for row in rows] for name in rows[0]}, seed)


def test_the_partner_is_of_the_class_that_is_confused_most_over_all_questions():
    rows = (
        question(0, 1, {1: 9, 2: 5, 3: 1}),
        question(1, 1, {1: 2, 2: 0, 3: 8}),  # 3 is confused with 1 more often: 9 votes against 5
        question(2, 2, {1: 0, 2: 9, 4: 3}),  # 4 has no question of its own, and 1 was never named
        question(3, 3, {1: 1, 3: 9, 2: 1}),  # a tie goes to the lower class
        question(4, 3, {-1: 9, 3: 9, 2: 0}),  # a name that is no class has no image
    )
    made, other = pairs(*rows), pairs(*rows, seed=1)
    classes = [option and option[1] for option in made.partner_classes]
    assert classes == [3, 3, None, 1, 2]
    assert made.plain == 1
    for epoch in range(20):
        assert made.partner(0, epoch) in (3, 4)
        assert made.partner(2, epoch) is None
    drawn = [[each.partner(q, e) for e in range(20)] for each in (made, other) for q in (0, 1)]
    assert all(set(images) == {3, 4} for images in drawn), "another image now and then"
    assert len(set(map(tuple, drawn))) == 4, "by seed and by question"


def test_classes_of_another_set_are_no_partners():
    made = pairs(question(0, 1, {1: 9, 2: 5}), question(1, 2, {1: 3, 2: 5}, card="bugs"))
    assert made.partner_classes == [None, None]


def some_plain() -> list[dict]:
    """Twelve questions of seven classes, of which three are confused with one another."""
    confused = [{n % 7: 9, (n + 1) % 3: 5} if n % 7 < 3 else {n % 7: 9, 9: 5} for n in range(12)]
    return [question(n, n % 7, confused[n]) for n in range(12)]


def test_a_pair_stands_in_one_step_whatever_surrounds_it():
    made = pairs(*some_plain())
    assert 0 < made.plain < 12
    for per_step, order in itertools.product((2, 3, 4, 5), ([*range(12)], [*range(11, -1, -1)])):
        uses = made.placed([(n, 0) for n in order], per_step)
        assert [use.question for use in uses if use.image == use.question] == order
        for place, use in enumerate(uses):
            if use.image != use.question:
                before = uses[place - 1]
                assert (before.question, before.paired) == (use.question, True)
                assert (place - 1) // per_step == place // per_step
        assert all(
            sum(u.paired for u in uses[s : s + per_step]) % 2 == 0
            for s in range(0, len(uses), per_step)
        )


def test_as_many_places_are_filled_as_a_training_has():
    """Also in a curriculum, where one question more may pair up the others anew."""
    made = pairs(*some_plain())

    def order_of(count: int) -> list[tuple[int, int]]:
        return question_order(made.image_ids, count, 0, easiness)

    for sign, per_step, steps in itertools.product((1, -1), range(2, 8), range(1, 9)):
        easiness = sign * np.arange(12)
        assert len(made.filled(order_of, per_step * steps, per_step)) == per_step * steps


def test_a_posed_partner_has_its_images_answer_and_the_same_options():
    rows = [question(0, 1, {1: 9, 2: 5, 3: 1}), question(1, 2, {1: 4, 2: 9})]
    made = pairs(*rows)
    first, second = made.placed([(0, 7)], 2)
    own, other = (made.posed(rows[0], use) for use in (first, second))
    assert own == {**rows[0], "pair": "7/q0"}
    assert other["pair"] == own["pair"]
    assert (other["answer_letter"], other["image_id"], other["mcq_id"]) == ("B", "few/1", "q0+q1")
    assert other["option_class_ids"] == own["option_class_ids"]
    assert other["truth_share"] == 0.1
    (alone,) = made.placed([(0, 7)], 1)
    assert made.posed(rows[0], alone)["pair"] == ""


@pytest.fixture
def frozen(rollouts):
    """Questions about the `few` card, to be read in pairs in steps of six."""
    from tasks.build_mcq import build_mcq

    (rollouts.root / "mcq").mkdir()
    run_stage(build_mcq, rollouts.root / "mcq", **mcq_arguments(rollouts))

    def read(pairs_in: int = 6) -> Questions:
        cache = rollouts.root / "cache"
        return Questions(
            [rollouts.root / "mcq"],
            [rollouts.card],
            "brief",
            seed=3,
            pairs_in=pairs_in,
            cache=cache,
        )

    return read


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_the_trainer_gets_both_questions_of_a_pair_in_one_step(frozen, order):
    rows = frozen().rows(60, order)
    shown = [rows[place] for place in range(60)]
    assert len(rows) == 60
    by_step = [shown[start : start + 6] for start in range(0, 60, 6)]
    for step in by_step:
        counts = Counter(row["pair"] for row in step if row["pair"])
        assert set(counts.values()) == {2}
    for one, two in itertools.pairwise(shown):
        if one["pair"] and one["pair"] == two["pair"]:
            assert one["prompt"] == two["prompt"], "the same options in the same order"
            assert one["answer_letter"] != two["answer_letter"]
            assert one["image_id"] != two["image_id"]
            assert one["image"].tobytes() != two["image"].tobytes()
            truth = two["options"][LETTERS.index(two["answer_letter"])]
            assert two["image_id"].split("/")[2] == truth, "the answer is the other picture's class"
            assert one["label"] != two["label"]
    assert sum(bool(row["pair"]) for row in shown) > 40


@pytest.mark.parametrize("order", ["shuffled", "curriculum"])
def test_a_round_goes_on_where_the_one_before_ended(frozen, order):
    """Steps that a trainer skips, and rounds, leave every pair and the order as they are."""
    whole = frozen()
    asked = [whole.rows(48, order)[place]["mcq_id"] for place in range(48)]
    assert [frozen().rows(48, order)[place]["mcq_id"] for place in range(48)] == asked, "resumed"
    first, second = frozen(), frozen()
    first.rows(24, order)
    place = first.place(24)
    rows = second.rows(24, order, after=place, skipped=24)
    after = [rows[number] for number in range(24, 48)]
    assert isinstance(place, Place)
    assert Counter(row["pair"] for row in after if row["pair"]).most_common(1)[0][1] == 2
    if order == "shuffled":
        assert [row["mcq_id"] for row in after] == asked[24:]


def test_a_curriculum_is_cut_to_the_questions_that_are_asked(frozen):
    """Its last epoch goes to its hard end: it is not the easy half of twice as many questions."""
    questions = frozen()
    rows = questions.rows(12, "curriculum")
    easiness = {i: m for i, m in zip(questions.image_ids, questions.frozen["margin"], strict=True)}
    own = [use.question for use in questions.uses if use.image == use.question]
    margins = [easiness[questions.image_ids[number]] for number in own]
    assert margins == sorted(margins, reverse=True)
    plain = frozen(0)
    plain.rows(len(own), "curriculum")
    assert [use.question for use in plain.uses] == own
    assert len(rows) == 12


def test_without_pairs_nothing_is_changed(frozen):
    rows = frozen(0).rows(12)
    assert "pair" not in rows[0]
    assert rows[0]["mcq_id"] in frozen(0).frozen["mcq_id"]
    with pytest.raises(ValueError, match="10 places are no whole steps of 6"):
        frozen().rows(10)


def paid(said: str, letters: str, questions: str, names: list[str]) -> list[float]:
    return contrast_reward(
        [SAID.format(letter) for letter in said],
        options=[["robin", "wren", "dunnock"]] * len(said),
        answer_letter=list(letters),
        mcq_id=list(questions),
        pair=names,
    )


def test_a_right_answer_is_paid_by_how_often_the_partner_is_right():
    # a: A A B C, three of four right on b: B B B A; c stays plain
    said = "".join(x + y for x, y in zip("AABC", "BBBA", strict=True)) + "CA"
    both = paid(said, "AB" * 4 + "CC", "ab" * 4 + "cc", ["p"] * 8 + ["", ""])
    assert both[0:8:2] == [0.75, 0.75, 0.0, 0.0]
    assert both[1:8:2] == [0.5, 0.5, 0.5, 0.0]
    assert both[8:] == [1.0, 0.0]


def test_an_answer_that_does_not_follow_the_picture_earns_nothing():
    assert paid("AAAA", "ABAB", "abab", ["p"] * 4) == [0.0] * 4
    assert paid("ABAB", "ABAB", "abab", ["p"] * 4) == [1.0] * 4


def test_half_a_pair_is_an_error_and_never_paid():
    with pytest.raises(ValueError, match="the pair p is not whole in this batch"):
        paid("AA", "AA", "aa", ["p", "p"])
    with pytest.raises(ValueError, match="the pair p is not whole in this batch"):
        paid("AAA", "AAA", "abc", ["p", "p", "p"])


def test_a_partner_says_nothing_of_whether_its_image_is_solved(tmp_path):
    rows = [
        {"step": step, "image_id": "few/a", "mcq_id": name, "completion": "", "advantage": 0.0}
        | {"reward/contrast": reward}
        for step, name, reward in ((1, "a", 1.0), (2, "b+a", 0.0))
    ]
    path = shards.shard_path(tmp_path, "completions", 1)
    shards.write(path, rows, schemas.completions(["contrast"]))
    assert latest_rewards(tmp_path) == {"few/a": 1.0}
