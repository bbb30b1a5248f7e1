"""Question building under every setting: what holds for any rollouts whatever, and each ablation."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_cards import Card
from tasks.build_mcq import Builder
from tasks.language.fuzzy import text_neighbours
from tasks.language.prompts import LETTERS
from tasks.questions.options import Neighbours, choose_options
from tasks.questions.settings import BuildMCQSettings
from tasks.questions.votes import Candidate
from tasks.runtime.errors import StageError
from tasks.tables.seeding import row_generator
from tasks.tables.split_table import Rows
from tests.conftest import write_rollouts

BASE = ("Painted Bunting", "Indigo Bunting", "Blue Jay", "Green Jay", "House Wren")
NOVEL = ("Marsh Wren", "Florida Jay", "Snow Bunting")
ALIASES = {"Florida Jay": ("Scrub Jay",), "Blue Jay": ("Cyanocitta cristata",)}
CARD = Card("few", 1, "bird", "species", {"kind": "drawn"}, BASE + NOVEL, ALIASES)
DEFAULT = {
    "num_options": 4,
    "min_options": 3,
    "top_up": "confusion",
    "vocabulary": "closed",
    "fuzzy_threshold": 0.0,
    "fuzzy_margin": 5.0,
    "options_from": "policy",
    "answer_from": "label",
    "min_truth_votes": 0,
    "max_unparsed_per_image": 1.0,
    "max_lost_share": 1.0,
}
WORDS = [
    *BASE,
    *NOVEL,
    "scrub jays",
    "marsh-wren",
    "Blue Jay or Green Jay",
    "painted buntng",
    "Snow Buntin",
    "Common Loon",
    "common loons",
    "Loon\nB. Blue Jay",
    "<|image_pad|>",
    "",
]


def build(answers: dict[str, list[str]], labels: dict[str, int], folder: Path, **changed):
    """(candidate rows, questions, stats) of images whose bytes are their ids."""
    write_rollouts(folder, answers)
    style, size, seed = (
        changed.pop(k, v) for k, v in (("style", "brief"), ("size", 4), ("seed", 0))
    )
    made = BuildMCQSettings(**DEFAULT | changed, shard_size=size)
    builder = Builder(CARD, made, style, seed)
    rows = [{"image_id": image_id, "label": label} for image_id, label in sorted(labels.items())]
    images = {row["image_id"]: row["image_id"].encode() for row in rows}
    built = list(builder.shards(Rows(pa.Table.from_pylist(rows)), folder, lambda part: images))
    told = [row for table, _ in built for row in table.to_pylist()]
    return told, [asked.to_pylist() for _, asked in built], builder.stats


SETTINGS = {
    "num_options": st.integers(3, 6),
    "min_options": st.integers(2, 3),
    "top_up": st.sampled_from(["confusion", "text", "random", "none"]),
    "vocabulary": st.sampled_from(["closed", "open"]),
    "fuzzy_threshold": st.sampled_from([0.0, 85.0]),
    "options_from": st.sampled_from(["policy", "random", "text", "hard_negative"]),
    "answer_from": st.sampled_from(["label", "majority"]),
    "min_truth_votes": st.integers(0, 2),
    "max_unparsed_per_image": st.sampled_from([1.0, 0.3]),
    "lone_wrong_options": st.sampled_from([0, 2, 3]),
}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    rollouts=st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.sampled_from(WORDS), min_size=1, max_size=8)),
        min_size=1,
        max_size=9,
    ),
    chosen=st.fixed_dictionaries(SETTINGS).filter(
        lambda chosen: chosen["top_up"] != "none" or not chosen["lone_wrong_options"]
    ),
    seed=st.integers(0, 9),
)
def test_any_rollouts_give_questions_that_keep_every_promise(
    tmp_path_factory, rollouts, chosen, seed
):
    answers = {f"few/{i}.jpg": said for i, (_, said) in enumerate(rollouts)}
    labels = {f"few/{i}.jpg": label for i, (label, _) in enumerate(rollouts)}
    folder = tmp_path_factory.mktemp("rules")
    told, questions, stats = build(answers, labels, folder, seed=seed, **chosen)
    base = set(labels.values())
    assert [row["image_id"] for row in told] == sorted(labels), "every image has its row"
    assert sum(stats["outcomes"].values()) == len(labels)
    kept = {row["image_id"] for row in told if row["outcome"] == "kept"}
    assert kept == {row["image_id"] for shard in questions for row in shard}
    forbidden = [name.lower() for name in (*NOVEL, "Scrub Jay")]
    for shard in questions:
        letters: dict[int, Counter[str]] = {}
        for row in shard:
            ids, names = row["option_class_ids"], row["options"]
            assert 2 <= len(names) <= chosen["num_options"]
            assert len({name.lower() for name in names}) == len(names)
            assert set(ids) - {-1} <= base
            assert chosen["vocabulary"] == "open" or -1 not in ids
            assert not any(novel in name.lower() for novel in forbidden for name in names)
            assert all(
                CARD.classes[i] == name for i, name in zip(ids, names, strict=True) if i >= 0
            )
            answer = ids[LETTERS.index(row["answer_letter"])]
            if chosen["answer_from"] == "label":
                assert answer == labels[row["image_id"]]
            assert row["label_differs"] == (answer != labels[row["image_id"]])
            assert ids.count(answer) == 1
            assert -1 <= row["margin"] <= row["truth_share"] <= 1
            assert row["entropy"] >= 0
            assert row["question"].count("\n") == len(names) + 1, "no option breaks its line"
            letters.setdefault(len(ids), Counter())[row["answer_letter"]] += 1
        for size, used in letters.items():
            tally = [used[letter] for letter in LETTERS[:size]]
            assert max(tally) - min(tally) <= 1


PAIRS = {
    "a": ["Indigo Bunting"] * 3 + ["Painted Bunting"] * 2,
    "b": ["Indigo Bunting", "House Wren", "House Wren"],
    "c": ["House Wren"] * 2,
    "d": ["Blue Jay", "Green Jay", "Green Jay", "Common Loon"],
    "e": ["Green Jay"],
    "f": ["Blue Jay"],
    "g": ["Blue Jay"],
}
OF = {"a": 0, "b": 0, "c": 0, "d": 2, "e": 3, "f": 1, "g": 4}


def options(questions, image_id) -> dict[str, str]:
    row = next(row for shard in questions for row in shard if row["image_id"] == image_id)
    return dict(zip(row["options"], row["option_sources"], strict=True))


def test_top_up_by_confusion_counts_over_the_whole_set(tmp_path):
    _, questions, stats = build(PAIRS, OF, tmp_path)
    # "c" was only called a House Wren; Painted Buntings are most often taken for Indigo ones.
    assert options(questions, "c") == {
        "House Wren": "policy",
        "Painted Bunting": "truth",
        "Indigo Bunting": "top_up",
    }
    assert stats["most_confused"][:2] == [
        ["Painted Bunting", "Indigo Bunting", 4],
        ["Painted Bunting", "House Wren", 4],
    ]


def test_top_up_by_text_takes_the_most_alike_name(tmp_path):
    _, questions, _ = build(PAIRS, OF, tmp_path, top_up="text")
    assert options(questions, "f")["Painted Bunting"] == "top_up"
    assert text_neighbours(CARD.classes, 1, range(5))[0] == 0
    assert text_neighbours(CARD.classes, 2, range(5))[0] == 3


@pytest.mark.parametrize("mode", ["random", "text", "hard_negative"])
def test_an_ablation_asks_the_same_images_with_as_many_other_options(tmp_path, mode):
    _, usual, _ = build(PAIRS, OF, tmp_path)
    _, other, _ = build(PAIRS, OF, tmp_path, options_from=mode)
    for a, b in zip(usual[0], other[0], strict=True):
        assert (a["image_id"], len(a["options"])) == (b["image_id"], len(b["options"]))
        assert a["truth_injected"] == b["truth_injected"]
        wrong = [s for s in b["option_sources"] if s == mode]
        assert len(wrong) == len(b["options"]) - 1
    if mode == "hard_negative":
        # An image of its own is never called an Indigo Bunting, and yet it is offered.
        assert set(options(other, "c")) == {"Painted Bunting", "Indigo Bunting", "House Wren"}


def test_random_options_do_not_depend_on_the_policy(tmp_path):
    answers = {str(i): ["Blue Jay", "Green Jay"] for i in range(40)}
    labels = {str(i): i % 5 for i in range(40)}
    _, questions, _ = build(answers, labels, tmp_path, options_from="random", size=40)
    offered = Counter(name for row in questions[0] for name in row["options"])
    assert min(offered[name] for name in BASE) > 10


def test_skip_rules_name_their_reason(tmp_path):
    answers = {**PAIRS, "f": ["Blue Jay", "Indigo Bunting", "", "", ""], "g": ["", ""]}
    told, _, stats = build(answers, OF, tmp_path, min_truth_votes=1, max_unparsed_per_image=0.5)
    outcomes = {row["image_id"]: row["outcome"] for row in told}
    assert outcomes == {
        "a": "kept",
        "b": "truth_rarely_proposed",
        "c": "truth_rarely_proposed",
        "d": "kept",
        "e": "truth_only",
        "f": "too_many_unparsed",
        "g": "no_candidates",
    }
    assert stats["outcomes"] == dict(Counter(outcomes.values()))


def test_open_names_stand_as_wrong_options(tmp_path):
    _, closed, _ = build(PAIRS, OF, tmp_path)
    assert "Common Loon" not in options(closed, "d")
    _, questions, _ = build(PAIRS, OF, tmp_path, vocabulary="open")
    assert options(questions, "d")["Common Loon"] == "policy"
    told, *_ = build(PAIRS, OF, tmp_path, vocabulary="open")
    row = next(row for row in told if row["image_id"] == "d")
    assert (row["names"], row["class_ids"]) == (
        ["Green Jay", "Blue Jay", "Common Loon"],
        [3, 2, -1],
    )
    a, b = (next(r for r in q[0] if r["image_id"] == "d") for q in (closed, questions))
    assert a["mcq_id"] != b["mcq_id"]


def test_a_misspelt_vote_counts_when_the_setting_says_so(tmp_path):
    answers = {
        "x": ["painted buntng", "Indigo Bunting"],
        "y": ["Indigo Bunting"],
        "z": ["Blue Jay"],
    }
    labels = {"x": 0, "y": 1, "z": 2}
    told, _, stats = build(answers, labels, tmp_path, fuzzy_threshold=85.0)
    assert told[0]["truth_votes"] == 1
    assert dict(zip(told[0]["answers"], told[0]["answer_steps"], strict=True)) == {
        "painted buntng": "fuzzy",
        "Indigo Bunting": "exact",
    }
    assert stats["match_steps"] == {"fuzzy": 1, "exact": 3}
    told, *_ = build(answers, labels, tmp_path)
    assert (told[0]["truth_votes"], told[0]["num_outside"]) == (0, 1)


def test_difficulty_is_share_margin_and_spread_of_the_votes(tmp_path):
    answers = {"a": ["Indigo Bunting"] * 6 + ["Painted Bunting"] * 2, "b": ["Painted Bunting"]}
    _, questions, _ = build(answers, {"a": 0, "b": 1}, tmp_path)
    first, second = questions[0]
    assert (first["truth_share"], first["margin"]) == (0.25, -0.5)
    assert first["entropy"] == pytest.approx(0.5623, abs=1e-4)
    assert (second["truth_share"], second["margin"], second["entropy"]) == (0.0, -1.0, 0.0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"vocabulary": "ajar"}, "vocabulary must be closed or open; got 'ajar'"),
        ({"options_from": "luck"}, "options_from .* got 'luck'"),
        ({"answer_from": "me"}, "answer_from .* got 'me'"),
        ({"fuzzy_threshold": 101.0}, "fuzzy_threshold"),
    ],
)
def test_impossible_rules_are_named(tmp_path, changed, told):
    with pytest.raises(StageError, match=told):
        build(PAIRS, OF, tmp_path, **changed)


def test_options_drawn_at_random_need_a_generator():
    drawn = {"num_options": 4, "min_options": 3, "top_up": "random", "confusion": [0, 1]}
    with pytest.raises(ValueError, match="generator"):
        choose_options([Candidate(2, 1, 0.0)], 3, generator=None, **drawn)
    found, _ = choose_options([Candidate(2, 1, 0.0)], 3, generator=row_generator(0, "x"), **drawn)
    assert len(found) == 3


def test_a_class_never_seen_confused_still_has_neighbours():
    assert Neighbours(CARD.classes, [0, 1, 2], {}).of("confusion", 1) == [0, 2]
