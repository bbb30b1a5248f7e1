"""Traits in completions: the first word of each counts, and what is not mentioned is wrong."""

from dataclasses import replace

import pytest

import data_cards
from tasks.evaluation import traits

CARD = data_cards.load("beetles")
NAME = "Drovia calpa"  # crimson round spotted lime ivory


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("<think>crimson round spotted lime ivory.</think><answer>A</answer>", set()),
        ("A Crimson beetle, Round, SPOTTED in lime; ivory head", set()),
        ("crimson round spotted cyan ivory. A calpa same same same lime same.", {"hue"}),
        ("crimson round spotted lime", {"head"}),
        ("crimsonish roundel", {"body", "shape", "marks", "hue", "head"}),
        ("", {"body", "shape", "marks", "hue", "head"}),
    ],
)
def test_the_first_word_of_each_trait_counts(text, wrong):
    read = traits.read_rightly(text, NAME, CARD)
    assert {trait for trait in CARD.traits if not read[trait]} == wrong
    assert read[traits.ALL] == (not wrong)


def row(image_id: str, completion: str, mode: str = "one_step") -> dict:
    return {
        "image_id": image_id,
        "label": CARD.classes.index(NAME),
        "group": "base",
        "mode": mode,
        "completion": completion,
    }


def test_the_table_pairs_images_by_id():
    right, wrong = "crimson round spotted lime ivory", "crimson round spotted cyan ivory"
    before = [row("a", wrong), row("b", right), row("a", right, mode="two_step")]
    after = [row("b", right), row("a", right), row("a", wrong, mode="two_step")]
    table = traits.table([before, after], CARD)
    assert (table["mode"], table["images"]) == ("one_step", 2)
    rows = {row["trait"]: row for row in table["rows"]}
    assert rows["hue"]["shares"] == [0.5, 1.0]
    assert rows["hue"]["change"]["mean"] == 0.5
    assert rows["head"]["shares"] == [1.0, 1.0]
    assert rows[traits.ALL]["shares"] == [0.5, 1.0]
    alone = traits.table([before], CARD)
    assert "change" not in alone["rows"][0]


def test_a_card_without_traits_has_no_table():
    plain = replace(CARD, traits={})
    assert traits.table([[row("a", "crimson")]], plain) == {}
