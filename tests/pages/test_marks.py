"""Which words of a completion are marked, and the figure of one image that shows them."""

import data_cards
from tasks.pages import marks
from tasks.pages.example import example_figure

CARD = data_cards.load("beetles")
TRUTH, RIVAL = "Drovia ilbara", "Drovia vulna"  # cyan, and lime; otherwise alike
DECIDED = {"hue": "cyan"}
PICTURE = "data:image/png;base64,AAAA"


def answer(name: str, options: tuple[str, ...] = ()) -> dict:
    return {"class_id": CARD.classes.index(name) if name else -1, "options": options}


def test_the_rival_is_what_the_image_was_taken_for_else_the_next_option():
    assert marks.rival([answer(RIVAL), answer(TRUTH)], TRUTH, {}, CARD) == RIVAL
    asked = answer(TRUTH, (TRUTH, RIVAL, "Drovia calpa"))
    assert marks.rival([asked], TRUTH, {"Drovia calpa": 2, RIVAL: 1}, CARD) == "Drovia calpa"
    assert marks.rival([answer("")], TRUTH, {}, CARD) == ""


def test_the_traits_that_decide_are_those_that_differ():
    assert marks.deciding(TRUTH, RIVAL, CARD) == DECIDED
    assert set(marks.deciding(TRUTH, "Drovia calpa", CARD)) == {"marks", "hue"}
    assert marks.deciding(TRUTH, "", CARD) == {}


def test_the_first_word_is_marked_and_the_text_stays_whole():
    text = "crimson round striped lime ivory. A ilbara same same same cyan same."
    cut = marks.pieces(text, DECIDED, CARD)
    assert [(piece, mark) for piece, mark in cut if mark] == [("lime", "wrong")]
    assert "".join(piece for piece, _ in cut) == text
    assert marks.pieces("it is Cyan", DECIDED, CARD)[-1] == ("Cyan", "right")
    assert marks.pieces("nothing", DECIDED, CARD) == [("nothing", "")]
    assert marks.pieces("", DECIDED, CARD) == []


def card(group: str, before: bool, after: bool, picture: str = PICTURE) -> dict:
    def side(name: str, correct: bool) -> dict:
        completion = [("<think>a <b> & ", ""), ("cyan", "right"), (" " + "word " * 40, "")]
        shown = {"correct": correct, "chosen": TRUTH, "text": "", "completion": completion}
        options = [{"letter": "A", "text": TRUTH, "tags": "truth"}]
        return {
            "name": name,
            "answers": [
                {"mode": "one_step", "options": [], **shown},
                {"mode": "two_step", "options": options, **shown},
                {"mode": "majority", "options": [], **shown, "correct": True},
            ],
        }

    return {
        "truth": f"{TRUTH} {group}",
        "other": RIVAL,
        "decided_by": ["hue: cyan, not lime"],
        "group": group,
        "picture": picture,
        "sides": [side("zero_shot", before), side("dive_k", after)],
    }


def test_the_figure_shows_an_image_that_training_won_in_both_modes():
    cards = [
        card("novel", True, True),
        card("novel", False, True, picture=""),
        card("base", False, True),
        card("novel", False, True),
    ]
    figure = example_figure({"kinds": [{"key": "won", "cards": cards}]})
    assert figure is not None
    assert figure.title == f"{TRUTH} novel, a novel class"
    assert "&lt;b&gt; &amp;" in figure.chart
    assert '<tspan class="right">cyan</tspan>' in figure.chart
    assert [row[:2] for row in figure.rows] == [
        ("zero_shot", "one_step"), ("zero_shot", "two_step"),
        ("dive_k", "one_step"), ("dive_k", "two_step"),
    ]  # fmt: skip
    assert example_figure({"kinds": [{"key": "won", "cards": cards[:2]}]}) is None
    assert example_figure({"kinds": [{"key": "right", "cards": cards}]}) is None
