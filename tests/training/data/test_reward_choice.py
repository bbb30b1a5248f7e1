"""Rewards by name: what can be set, what is refused before a model is loaded, what a failure costs."""

import numpy as np
import pytest
import torch

import data_cards
from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from training.data.reward_choice import choose_rewards
from training.rewards import (
    caption_format_reward,
    difficulty_weighted_reward,
    format_reward,
    overlong_reward,
)
from training.settings import REWARDS, TrainSettings

SAID = "<think>pale bill</think><answer>{}</answer>"


def chosen(weights, cards, **changed):
    """The rewards of these weights; a token is a word."""
    settings = settings_of(TrainSettings, rewards=weights, **changed)
    return choose_rewards(settings, cards, lambda text: len(text.split()))


@pytest.fixture
def card(few_beetles):
    return few_beetles


def test_every_known_reward_can_be_chosen_and_is_named_as_it_is_set(card):
    rewards = chosen(dict.fromkeys(REWARDS, 1.0), [card])
    assert [reward.__name__ for reward in rewards] == list(REWARDS)
    columns = {
        "options": [["a", "b"]],
        "answer_letter": ["B"],
        "label": [0],
        "card": ["few"],
        "truth_share": [0.25],
        "completion_ids": [[1] * 10],
        "mcq_id": ["q"],
        "image_id": ["few/x"],
        "pair": [""],
    }
    paid = {reward.__name__: reward([SAID.format("B")], **columns)[0] for reward in rewards}
    assert paid["letter"] == paid["format"] == paid["think_length"] == paid["contrast"] == 1.0
    assert paid["difficulty_weighted"] == 1.75
    assert paid["frequency"] == 0.0, "a letter names no class"
    assert (
        paid["exact"] == paid["overlong"] == paid["caption_format"] == paid["direct_format"] == 0.0
    )


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({"lettre": 1.0}, r"unknown 'lettre' .*; did you mean letter\?"),
        ({"niceness": 1.0}, "unknown 'niceness' .*; known: format, letter"),
        ({":polite": 1.0}, "':polite' cannot be imported: No module named ''"),
        ({"no_such_module:reward": 1.0}, "'no_such_module:reward' cannot be imported: No module"),
        ({"tests.paid:nothing": 1.0}, "'tests.paid:nothing' cannot be imported"),
        ({"tests.paid:without_columns": 1.0}, "must accept completions and, by name, any column"),
        ({"os:sep": 1.0}, "'os:sep' is not a function"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_in_a_sentence(card, weights, why):
    with pytest.raises(StageError, match=why):
        chosen(weights, [card])


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({}, "rewards is empty"),
        ({"letter": "much"}, "the weight of 'letter' must be a number"),
        ({"letter": True}, "the weight of 'letter' must be a number"),
        ({"letter": float("nan")}, "the weight of 'letter' must be a number of at most 1e\\+15"),
        ({"letter": float("-inf")}, "at most 1e\\+15 in size; got -inf"),
        ({"letter": 10**39}, "at most 1e\\+15 in size; got 1e\\+39"),
    ],
)
def test_weights_that_are_none_are_refused_with_the_settings(weights, why):
    with pytest.raises(StageError, match=why):
        settings_of(TrainSettings, rewards=weights)


def test_a_reward_of_ones_own_is_found_in_the_working_directory(card, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def polite(completions, **columns):\n    return ['please' in c for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    (reward,) = chosen({"my_rewards:polite": 1.0}, [card])
    assert reward(["please", "now"], mcq_id=["a", "b"]) == [1.0, 0.0]


def test_one_that_fails_costs_its_part_only_and_says_so_once(card, capsys):
    metrics = []
    _, reward = chosen({"letter": 1.0, "tests.paid:broken": 1.0}, [card])
    for _ in range(3):
        told = {"log_metric": lambda *given: metrics.append(given), "mcq_id": ["a", "b"]}
        assert reward(["x", "y"], **told) == [None, None]
    assert metrics == [("tests.paid:broken/failed", 1.0)] * 3
    assert capsys.readouterr().err.count("KeyError") == 1


@pytest.mark.parametrize(
    ("returned", "paid", "failed", "says"),
    [
        ([1.0, float("inf")], [1.0, None], 0.5, "gave inf, which cannot be summed"),
        ([float("nan"), 2], [None, 2.0], 0.5, "gave nan"),
        ([-1e30, 10**400], [None, None], 1.0, "gave -1e+30"),
        ([np.float32(0.5), np.bool_(True)], [0.5, 1.0], 0, ""),
        (np.array([3, np.inf]), [3.0, None], 0.5, "gave inf"),
        (torch.tensor([0.25, float("nan")]), [0.25, None], 0.5, "gave nan"),
        ([True, None], [1.0, None], 0, ""),
        ([1e16, 1.0], [None, 1.0], 0.5, "gave 1e+16"),
        (["good", 1.0], [None, None], 1.0, "failed (ValueError"),
        (0.5, [None, None], 1.0, "failed (TypeError"),
        ([1.0], [None, None], 1.0, "1 rewards for 2 completions"),
    ],
)
def test_a_value_that_cannot_be_summed_fails_for_its_own_completion(
    card, monkeypatch, capsys, returned, paid, failed, says
):
    monkeypatch.setattr("tests.paid.equal", lambda completions, **columns: returned)
    (reward,) = chosen({"tests.paid:equal": 1.0}, [card])
    metrics = []
    for _ in range(2):
        told = {"log_metric": lambda *given: metrics.append(given), "mcq_id": ["a", "b"]}
        assert reward(["x", "y"], **told) == paid
    said = capsys.readouterr().err
    assert said.count("\n") == bool(says)
    assert says in said
    assert metrics == [("tests.paid:equal/failed", failed)] * 2 * bool(failed)


def test_a_large_weight_leaves_less_room_for_a_reward(card, monkeypatch, capsys):
    monkeypatch.setattr("tests.paid.equal", lambda completions, **c: [1e12, 1e3])
    (reward,) = chosen({"tests.paid:equal": 1e9}, [card])
    assert reward(["x", "y"], mcq_id=["a", "b"]) == [None, 1e3]


def test_each_answer_is_judged_by_its_own_cards_names(few_beetles, monkeypatch, tmp_path):
    text = (data_cards.FOLDER / "few.md").read_text().replace("rose gold-belt", "robin")
    (data_cards.FOLDER / "bugs.md").write_text(text)
    cards = [few_beetles, data_cards.load("bugs")]
    (reward,) = chosen({"exact": 1.0}, cards)
    said = [SAID.format(name) for name in ("robin", "robin", "rose gold-belt", "rose gold-belt")]
    columns = {
        "label": [0, 0, 0, 0],
        "card": ["few", "bugs", "few", "bugs"],
        "mcq_id": list("abcd"),
    }
    assert reward(said, **columns) == [0.0, 1.0, 1.0, 0.0]


def test_the_right_genus_earns_a_part_of_the_point(few_beetles):
    (reward,) = chosen({"graded": 1.0}, [few_beetles])
    options = ["rose gold-belt", "teal gold-belt", "rose cyan-belt"]

    def paid(said: str, texts: list[str]) -> float:
        columns = {"label": [0], "options": [texts], "card": ["few"], "mcq_id": ["q"]}
        return reward([SAID.format(said)], **columns)[0]

    assert [paid(letter, options) for letter in "ABC"] == [1.0, 0.5, 0.0]
    assert paid("gold-belt", options) == 0.0, "which of two options it means is open"
    spoken = ("rose gold-belt", "Teal Gold Belt", "a gold belt", "rose cyan-belt", "no idea")
    assert [paid(said, ["rose gold-belt"]) for said in spoken] == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert reward(["no tags"], label=[0], options=[options], card=["few"], mcq_id=["q"]) == [0.0]


def test_a_graded_reward_needs_a_taxonomy():
    with pytest.raises(
        StageError, match="graded needs a taxonomy, and the data card pets has none"
    ):
        chosen({"graded": 1.0}, [data_cards.load("pets")])


def test_a_harder_question_pays_more():
    columns = {"options": [["a", "b"]] * 3, "answer_letter": ["A"] * 3}
    paid = difficulty_weighted_reward(
        [SAID.format("A"), SAID.format("A"), SAID.format("B")],
        truth_share=[0.0, 1.0, 0.0],
        **columns,
    )
    assert paid == [2.0, 1.0, 0.0]


def thought(words: int, answer: str) -> str:
    return f"<think>{'x ' * words}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        (thought(0, "B"), 1.0),
        (thought(10, "B"), 1.0),
        (thought(11, "teal gold-belt"), 0.9),
        (thought(15, "B"), 0.5),
        (thought(20, "B"), 0.0),
        (thought(90, "B"), 0.0),
        ("<answer>B</answer>", 1.0),
        ("x " * 15 + "<answer>B</answer>", 0.5),
        ("<think>" + "x " * 15 + "<answer>B</answer>", 0.5),
        (thought(0, "A"), 0.0),
        (thought(0, "A or B"), 0.0),
        (thought(0, ""), 0.0),
        ("x", 0.0),
        ("", 0.0),
    ],
)
def test_a_short_thought_is_paid_for_and_never_before_a_wrong_answer(card, text, paid):
    (reward,) = chosen({"think_length": 1.0}, [card], think_target=10, think_limit=20)
    options = ["rose gold-belt", "teal gold-belt", "rose cyan-belt"]
    columns = {"label": [1], "options": [options], "answer_letter": ["B"], "card": ["few"]}
    columns["mcq_id"] = ["q"]
    assert reward([text], **columns) == pytest.approx([paid])
    assert reward([[{"role": "assistant", "content": text}]], **columns) == pytest.approx([paid])


def test_beside_exact_or_graded_a_thought_is_paid_for_only_before_the_right_name(card):
    weights = {"exact": 0.6, "graded": 0.4, "think_length": 1.0}
    rewards = chosen(weights, [card], think_target=10, think_limit=20)
    columns = {"label": [0], "options": [["rose gold-belt"]], "answer_letter": ["A"]}
    columns |= {"card": ["few"], "mcq_id": ["q"]}
    said = ("Rose Gold Belt", "teal gold-belt", "a gold belt", "A", "no idea")
    paid = [[r([thought(5, text)], **columns)[0] for r in rewards] for text in said]
    assert paid[:3] == [[1.0, 1.0, 1.0], [0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    assert paid[3:] == [[0.0, 0.0, 0.0]] * 2


def test_a_wrong_answer_earns_nothing_for_any_length_text_or_card(few_beetles):
    """Over many texts: think_length is paid only where letter or, for an open question, exact is."""
    import random

    (data_cards.FOLDER / "bugs.md").write_text((data_cards.FOLDER / "few.md").read_text())
    cards = [few_beetles, data_cards.load("bugs")]
    short, letter, exact = chosen({"think_length": 1.0, "letter": 1.0, "exact": 1.0}, cards)
    rng = random.Random(3)
    names = ["rose gold-belt", "teal gold-belt", "rose cyan-belt"]
    pieces = (
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "A",
        "B",
        *names,
        "x " * 40,
        "or",
        " ",
    )
    for size in (3, 1):
        texts = ["".join(rng.choices(pieces, k=rng.randint(0, 7))) for _ in range(400)]
        texts += [thought(rng.randint(0, 80), rng.choice(["A", "B", *names])) for _ in range(400)]
        columns = {
            "label": [0] * 800, "options": [names[:size]] * 800, "answer_letter": ["A"] * 800,
            "card": ["few", "bugs"] * 400, "mcq_id": ["q"] * 800,
        }  # fmt: skip
        right = (letter if size > 1 else exact)(texts, **columns)
        paid = short(texts, **columns)
        assert sum(right) > 50
        assert all(0 <= value <= whole for value, whole in zip(paid, right, strict=True))
        assert sum(0 < value < 1 for value in paid) > 0


def test_the_overlong_penalty_falls_to_minus_one_over_the_last_tokens():
    reward = overlong_reward(100, 20)
    lengths = [10, 80, 85, 90, 100]
    paid = reward([""] * 5, completion_ids=[[0] * n for n in lengths])
    assert paid == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0])


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        ("<caption>a pale bill</caption>" + SAID.format("A"), 1.0),
        ("\n<caption>a pale bill</caption>\n" + SAID.format("A") + "\n", 1.0),
        (SAID.format("A"), 0.0),
        ("<caption> </caption>" + SAID.format("A"), 0.0),
        ("so: <caption>a</caption>" + SAID.format("A"), 0.0),
        ("<caption>a</caption><caption>b</caption>" + SAID.format("A"), 0.0),
        ("<caption>a" + SAID.format("A"), 0.0),
        (SAID.format("A") + "<caption>a</caption>", 0.0),
        ("", 0.0),
    ],
)
def test_a_caption_comes_before_the_reasoning(text, paid):
    assert caption_format_reward([text]) == [paid]
    assert format_reward([text]) == [float(text == SAID.format("A"))]
