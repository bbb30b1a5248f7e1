"""Answers as models give them: a lead-in, a remark, a second name; and what no remark may do."""

import itertools
import random

import pytest

import data_cards
from data_cards import Card
from tasks.language.answers import choose
from tasks.language.class_names import ClassNames, Match
from tasks.language.prompts import completion
from tests.conftest import settings_of
from training.data.reward_choice import choose_rewards
from training.settings import TrainSettings

BIRDS = Card(
    "birds", 1, "bird", "species", {"kind": "drawn"},
    ("Marsh Harrier", "Hen Harrier", "Red Kite", "Osprey", "Harrier", "Kite (black)"),
    {
        "Marsh Harrier": ("western marsh harrier", "Circus aeruginosus"),
        "Hen Harrier": ("northern harrier", "Circus cyaneus"),
        "Red Kite": ("Milvus milvus",),
        "Osprey": ("fish hawk", "Pandion haliaetus", "Pandion sp."),
    },
)  # fmt: skip
PETS = Card("pets", 1, "pet", "breed", {"kind": "drawn"}, ("Boxer", "Beagle", "St. Bernard"))
CARS = Card("cars", 1, "car", "model", {"kind": "drawn"}, ("2011 Ford Focus", "2009 Kia Soul"))
FLOWERS = Card(
    "flowers", 1, "flower", "species", {"kind": "drawn"},
    ("marigold", "english marigold", "water lily", "rose"),
    {
        "marigold": ("Tagetes sp.",),
        "english marigold": ("pot marigold", "Calendula officinalis"),
        "water lily": ("Nymphaea alba",),
    },
    name_in_parentheses=True,
)  # fmt: skip
JOINTS = (" or ", "/", ", ", " and ", "\n", "; ", " | ", " & ", " vs ", " - ", " — ", " (", " [", ": ",
          " (or ", ") (", ". ", " (not ", " (like ", " (female ", ", possibly ", " = ")  # fmt: skip

READ = [
    # lead-ins
    (BIRDS, "Species name: red kite", "Red Kite"),
    (BIRDS, "species: osprey", "Osprey"),
    (BIRDS, "**Species:** *Osprey*", "Osprey"),
    (BIRDS, "_Bird species: osprey_", "Osprey"),
    (BIRDS, "Bird: Hen Harrier", "Hen Harrier"),
    (BIRDS, "The bird in the image is: a hen harrier.", "Hen Harrier"),
    (BIRDS, "Answer: Species name: Red Kite", "Red Kite"),
    (BIRDS, "Species：red kite", "Red Kite"),
    (PETS, "Breed name: boxer", "Boxer"),
    (PETS, "Pet breed: **St. Bernard**", "St. Bernard"),
    (CARS, "Make and model: Ford Focus 2011", "2011 Ford Focus"),
    (CARS, "Year, make, and model: 2009 Kia Soul", "2009 Kia Soul"),
    # remarks in parentheses
    (BIRDS, "species name: red kite (milvus milvus)", "Red Kite"),
    (BIRDS, "red kite (Milvus regalis)", "Red Kite"),
    (BIRDS, "Red Kite [Milvus milvus]", "Red Kite"),
    (BIRDS, "Circus cyaneus (northern harrier)", "Hen Harrier"),
    (BIRDS, "hen harrier (circus cyaneus) (female)", "Hen Harrier"),
    (BIRDS, "hen harrier (female or juvenile)", "Hen Harrier"),
    (BIRDS, "hen harrier (adult male in breeding plumage)", "Hen Harrier"),
    (BIRDS, "osprey (genus: Pandion)", "Osprey"),
    (FLOWERS, "calendula officinalis (pot marigold)", "english marigold"),
    (FLOWERS, "pot marigold (english marigold)", "english marigold"),
    (FLOWERS, "english marigolds (pot marigolds)", "english marigold"),
    # remarks after a comma or a dash
    (BIRDS, "red kite, milvus milvus", "Red Kite"),
    (BIRDS, "red kite, millvus milvis", "Red Kite"),
    (BIRDS, "red kite, milvus milvus fasciicauda", "Red Kite"),
    (BIRDS, "Milvus milvus - red kite", "Red Kite"),
    (PETS, "Beagle, Canis lupus familiaris", "Beagle"),
    (PETS, "breed: boxer - Canis familiaris", "Boxer"),
    (BIRDS, "hen harrier, female", "Hen Harrier"),
    (BIRDS, "Osprey, fish hawk, Pandion haliaetus", "Osprey"),
    (BIRDS, "Common name: Osprey\nScientific name: Pandion haliaetus", "Osprey"),
    # a rank after it, a genus alone
    (BIRDS, "red kite species", "Red Kite"),
    (BIRDS, "Pandion", "Osprey"),
    (BIRDS, "pandion spp.", "Osprey"),
    (BIRDS, "genus Pandion", "Osprey"),
    (BIRDS, "osprey (pandion sp.)", "Osprey"),
    # the name in parentheses, which this card allows
    (FLOWERS, "nymphaea odorata (water lily)", "water lily"),
    (FLOWERS, "Species: Nuphar (common name: water lily)", "water lily"),
]
REFUSED = [
    (BIRDS, "suspected species: red kite", "a hedge leads in"),
    (BIRDS, "most likely species: red kite", "a hedge leads in"),
    (BIRDS, "not species: red kite", "a denial leads in"),
    (BIRDS, "prey: red kite", "this leads in to no name"),
    (BIRDS, "species name:", "nothing follows"),
    *((BIRDS, text.format(hedge), "a hedge") for hedge in (
        "possible", "possibly", "probable", "probably", "presumably", "likely", "tentative",
    ) for text in (
        "{} red kite", "red kite ({})", "red kite, {}", "({}) red kite", "red kite {}",
        "red kite (Milvus milvus, {})", "species: red kite ({})",
    )),
    (BIRDS, "red kite (for example)", "a hedge"),
    (BIRDS, "red kite (or similar)", "a hedge"),
    (BIRDS, "red kite (female or osprey)", "another class among sexes"),
    (BIRDS, "red kite (Pandion haliaetus)", "another class's scientific name"),
    (BIRDS, "red kite (pandion)", "another class's genus"),
    (BIRDS, "red kite (genus: pandion sp.)", "another class's genus"),
    (BIRDS, "red kite, pandion haliaetus", "another class's scientific name"),
    (BIRDS, "red kite (ospreys)", "another class in the plural"),
    (BIRDS, "kite (white)", "a remark that contradicts the class's own"),
    (BIRDS, "red kite, common buzzard", "a second name, of no class"),
    (BIRDS, "red kite, its tail is forked", "a sentence"),
    (BIRDS, "black-winged kite (red kite)", "the name in parentheses, which this card does not allow"),
    (PETS, "boxer, tibetan mastiff", "a second name, of no class"),
    (PETS, "boxer, akita americana", "this looks scientific, but no breed's name is"),
    (BIRDS, "red kite, pandion haliaetus carolinensis", "another class's subspecies"),
    (BIRDS, "red kite, milvus milvus is common", "a sentence"),
    (CARS, "2011 Ford Focus, Toyota Corolla", "this looks scientific, but no car's name is"),
    (FLOWERS, "common marigold (calendula officinalis)", "what stands before contains another class"),
    (FLOWERS, "marigold (calendula officinalis)", "another class's scientific name"),
    (FLOWERS, "lotus or nuphar (water lily)", "a hedge before it"),
    (FLOWERS, "a small yellow flower of ponds (water lily)", "a sentence before it"),
    (FLOWERS, "nuphar (water lily or rose)", "two in parentheses"),
    (FLOWERS, "nuphar (water lily) (rose)", "two in parentheses"),
    (FLOWERS, "flower (rose, water lily)", "two in parentheses"),
    (FLOWERS, "garden plant (tagetes)", "a genus is no name in parentheses"),
]  # fmt: skip


@pytest.mark.parametrize(("card", "text", "name"), READ)
def test_a_name_is_read_with_what_models_say_around_it(card, text, name):
    names = ClassNames.of(card)
    for said in (text, text.lower(), text.upper()):
        assert names.match(said).class_id == card.classes.index(name), said


@pytest.mark.parametrize(("card", "text", "why"), REFUSED)
def test_what_hedges_or_contradicts_is_no_answer(card, text, why):
    assert ClassNames.of(card).match(text).class_id is None, why


def test_a_class_that_is_a_word_of_sex_or_age_is_still_a_class():
    names = ClassNames(["Rooster", "Hen", "Chick"])
    for text in ("rooster (hen)", "rooster, hen", "rooster (hen or chick)", "rooster (chicks)"):
        assert names.match(text).class_id is None, text
    options = ["Rooster", "Hen", "Chick"]
    assert choose(completion("t", "Rooster (hen)"), options).index is None


@pytest.mark.parametrize("name_in_parentheses", [False, True])
def test_naming_two_classes_in_any_form_earns_nothing(name_in_parentheses):
    """Neither first nor second, whatever joins them: names, aliases, scientific names, genera, plurals."""
    card = data_cards.load("cub")
    names = ClassNames(
        card.classes, card.aliases, lead_in="bird", name_in_parentheses=name_in_parentheses
    )
    forms = [
        [
            form
            for text in (name, *card.aliases[name])
            for form in (text, text + "s")
            if names.match(form).class_id is not None
        ]
        for name in card.classes
    ]
    rng = random.Random(0)
    for first, second in rng.sample(list(itertools.permutations(range(200), 2)), 600):
        for joint in JOINTS:
            for lead in ("", "species: "):
                text = lead + rng.choice(forms[first]) + joint + rng.choice(forms[second])
                text += ")" * text.count("(") + "]" * text.count("[")
                assert names.match(text).class_id is None, text


def test_an_open_question_is_rewarded_as_it_is_evaluated():
    (reward,) = choose_rewards(settings_of(TrainSettings, rewards={"exact": 1.0}), [BIRDS], len)
    texts = [text for card, text, name in READ if card is BIRDS]
    labels = [BIRDS.classes.index(name) for card, _, name in READ if card is BIRDS]
    said = [completion("t", text) for text in texts]
    assert reward(said, label=labels, card=["birds"] * len(said)) == [1.0] * len(said)
    said = [completion("t", text) for card, text, _ in REFUSED if card is BIRDS]
    for label in range(len(BIRDS.classes)):
        columns = {"label": [label] * len(said), "card": ["birds"] * len(said)}
        assert reward(said, **columns) == [0.0] * len(said)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("Species name: B", 1),
        ("species name: red kite", 1),
        ("**Species:** B. Red Kite (Milvus milvus)", 1),
        ("Answer: A", 0),
        ("A: Osprey", 0),
        ("Red Kite (female or juvenile)", 1),
        ("B (male)", 1),
        ("B (probable)", None),
        ("probable red kite", None),
        ("Red Kite (presumably)", None),
        ("Species: A or B", None),
        ("species: red kite (osprey)", None),
        ("Red Kite (female or Osprey)", None),
    ],
)
def test_a_multiple_choice_answer_is_read_in_the_same_way(text, index):
    assert choose(completion("t", text), ["Osprey", "Red Kite", "Hen Harrier"]).index == index


def test_a_lead_in_made_of_an_options_own_words_is_kept():
    assert choose(completion("t", "Model: B"), ["Model", "Make"]).index is None
    assert choose(completion("t", "Model: A"), ["Model", "Make"]).index == 0


def test_an_open_name_is_the_same_with_what_stands_around_it():
    names = ClassNames.of(BIRDS)
    said = ["Common Buzzard", "species name: common buzzard", "common buzzards (Buteo buteo)",
            "Bird species: Common buzzard, Buteo buteo", "common buzzard, juvenile"]  # fmt: skip
    assert {names.open_key(text) for text in said} == {"common buzzard"}
    assert names.open_key("species name: possible common buzzard") is None


def test_an_alias_of_a_genus_must_not_be_another_classes_name():
    with pytest.raises(ValueError, match=r"'Kite sp.' \(an alias of 'Osprey'\) and 'Kite'"):
        ClassNames(["Kite", "Osprey"], {"Osprey": ["Kite sp."]})
    with pytest.raises(ValueError, match="are the same name"):
        ClassNames(["Kite", "Osprey"], {"Osprey": ["Milvus sp."], "Kite": ["Milvus"]})
    names = ClassNames(["Kite", "Osprey"], {"Kite": ["Milvus sp.", "Milvus"]})
    assert names.match("Milvus") == Match(0, "alias")
    assert names.match("Milvus sp.").class_id == 0
