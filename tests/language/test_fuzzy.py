"""The fuzzy step, which runs when it is set, and names that are no class."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz import fuzz

from data_cards import load
from tasks.language.class_names import ClassNames, Match
from tasks.language.fuzzy import text_neighbours
from tasks.language.words import normalize
from tests.language.test_class_names import AIRCRAFT, ALIASES, BIRDS, SETTLED

SPARROWS = ("Seaside Sparrow", "Henslow Sparrow", "Painted Bunting", "Indigo Bunting", "Blue Jay")


@pytest.mark.parametrize(
    ("names", "text", "found", "why"),
    [
        (SPARROWS, "Henslw Sparow", 1, "two letters missing"),
        (SPARROWS, "painted buntng.", 2, "a letter missing"),
        (SPARROWS, "Sparrow", None, "a word that several share is near to none"),
        (SPARROWS, "not Indigo Bunting", None, "a denial is no misspelling"),
        (SPARROWS, "Indigo Buntin or so", None, "a hedge"),
        (SPARROWS, "Indigo Buntin (or Blue Jay)", None, "a hedge in a remark"),
        (AIRCRAFT, "737-250", None, "a number apart is another aircraft"),
        (AIRCRAFT, "Spitfyre", AIRCRAFT.index("Spitfire"), "no lookalike name"),
        (AIRCRAFT, "Gulfstream Y", None, "Gulfstream IV and V are too alike to tell apart"),
        (("Artic Tern", "Arctic Fern"), "Arctic Tern", None, "as near to one as to the other"),
    ],
)
def test_a_misspelling_means_a_class_only_when_no_other_is_near(names, text, found, why):
    assert ClassNames(names).match(text).class_id is None
    fuzzy = ClassNames(names, fuzzy_threshold=85, fuzzy_margin=5)
    step = "none" if found is None else "fuzzy"
    assert fuzzy.match(text) == Match(found, step), why


def test_the_margin_is_kept_over_the_second_best():
    names, text = ("Alder Flycatcher", "Acadian Flycatcher"), "Aldan Flycatcher"
    narrow = ClassNames(names, fuzzy_threshold=80, fuzzy_margin=0)
    assert narrow.match(text).step == "fuzzy"
    wide = ClassNames(names, fuzzy_threshold=80, fuzzy_margin=20)
    assert wide.match(text) == Match(None, "none")


@given(st.text(max_size=30) | st.sampled_from([*BIRDS, *SPARROWS, "Blue Ja", "Seaside Sparow"]))
@SETTLED
def test_the_fuzzy_step_never_changes_what_an_earlier_step_found(text):
    strict, fuzzy = ClassNames(SPARROWS), ClassNames(SPARROWS, fuzzy_threshold=80, fuzzy_margin=5)
    if strict.match(text).step != "none":
        assert fuzzy.match(text) == strict.match(text)


@pytest.mark.parametrize(("threshold", "margin"), [(101, 5), (-1, 5), (90, -1)])
def test_impossible_thresholds_are_refused(threshold, margin):
    with pytest.raises(ValueError, match="fuzzy_threshold"):
        ClassNames(SPARROWS, fuzzy_threshold=threshold, fuzzy_margin=margin)


# Names that are no class, as wrong options.


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Laysan Albatross", "a class"),
        ("arctic tern", "an alias"),
        ("Bufflehead", "fits two classes"),
        ("young Laysan Albatrosses", "holds a class"),
        ("Albatross", "part of a class's name: it may be right"),
        ("House Sparrow or Crow", "a hedge"),
        ("I cannot tell what this bird is from here", "a sentence"),
        ("<|image_pad|>", "a token of a chat template"),
        ("Crow\nB. Gull", "a line break would add an option"),
        ("...", "nothing"),
    ],
)
def test_what_may_be_right_or_is_no_name_is_never_an_open_option(text, why):
    assert ClassNames(BIRDS, ALIASES).open_key(text) is None, why


def test_spellings_of_a_name_that_is_no_class_share_a_key():
    names = ClassNames(BIRDS, ALIASES)
    assert names.open_key("Fish-Crow") == names.open_key("the fish crows.") == "fish crow"
    assert names.open_key("Tesla Model S 2012") == names.open_key("2012 Tesla Model S")
    assert names.open_key("Black-and-white Warbler") == "black and white warbler"


@pytest.mark.parametrize("among", [range(0, 200, 2), range(200)])
def test_neighbours_are_those_of_rapidfuzz_in_any_order_of_words(among):
    names = load("cub").classes
    for class_id in range(0, 200, 7):
        scores = {
            other: fuzz.token_sort_ratio(normalize(names[class_id]), normalize(names[other]))
            for other in among
            if other != class_id
        }
        nearest = sorted(scores, key=lambda other: (-scores[other], other))
        assert text_neighbours(names, class_id, among) == nearest


def test_the_names_are_normalised_once_for_all_classes(monkeypatch):
    normalised = []
    monkeypatch.setattr(
        "tasks.language.fuzzy.normalize", lambda text: normalised.append(text) or normalize(text)
    )
    names = [f"kind {number % 37} of {number}" for number in range(500)]
    for class_id in range(100):
        assert len(text_neighbours(names, class_id, range(500))) == 499
    assert len(normalised) == 500
