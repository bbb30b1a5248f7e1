"""How near an answer is to the truth: groups named alone, groups in common, and the cards' taxonomies."""

import pytest

import data_cards
from tasks.evaluation.modes import GROUP_ONLY, read_open
from tasks.evaluation.near_misses import near_misses
from tasks.language.class_names import ClassNames
from tasks.language.taxonomy import Taxonomy
from tasks.runtime.errors import StageError

CLASSES = ("737-200", "737-300", "747-100", "A310", "Spitfire")
GROUPS = {
    "Boeing": ("737-200", "737-300", "747-100"),
    "737": ("737-200", "737-300"),
    "747": ("747-100",),
    "Airbus": ("A310",),
}
TAXONOMY = Taxonomy(CLASSES, GROUPS)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("737", "737"),
        ("Boeing 737", "737"),  # a group within a group goes by both names
        ("a boeing", "Boeing"),
        ("737-200", None),  # a class
        ("Boeing or Airbus", None),
        ("some aeroplane", None),
        ("", None),
    ],
)
def test_a_group_is_named_as_a_whole(text, group):
    assert TAXONOMY.group(text) == group


@pytest.mark.parametrize(
    ("class_id", "text", "depth"),
    [
        (0, "", 1.0),
        (1, "", 2 / 3),  # the right family
        (2, "", 1 / 3),  # the right maker
        (3, "", 0.0),
        (None, "Boeing 737", 2 / 3),
        (None, "Boeing", 1 / 3),
        (None, "747", 1 / 3),  # a wrong family of the right maker
        (None, "Airbus", 0.0),
        (None, "no idea", 0.0),
    ],
)
def test_depth_is_the_share_of_the_way_that_is_right(class_id, text, depth):
    assert TAXONOMY.depth(0, class_id, text) == pytest.approx(depth)


def test_a_class_without_a_group_is_right_or_wrong():
    assert TAXONOMY.depth(4, 4) == 1.0
    assert TAXONOMY.depth(4, 0) == TAXONOMY.depth(4, None, "Boeing") == 0.0


def test_groups_that_are_spelled_alike_are_refused():
    with pytest.raises(StageError, match=r"the card's taxonomy: .*are the same name"):
        Taxonomy(("a b", "c d"), {"Kites": ("a b",), "kites": ("c d",)})


def test_an_answer_that_names_only_a_group_is_no_longer_unknown():
    card = data_cards.load("cub")
    names, taxonomy = ClassNames.of(card), Taxonomy.of(card)
    read = read_open("<answer>albatross</answer>", names, taxonomy)
    assert (read.class_id, read.status, read.answer) == (None, GROUP_ONLY, "albatross")
    assert read_open("<answer>albatross</answer>", names).status == "none"
    assert read_open("<answer>species: albatross</answer>", names, taxonomy).status == GROUP_ONLY
    assert read_open("<answer>Laysan Albatross</answer>", names, taxonomy).status == "exact"
    assert read_open("<answer>penguin</answer>", names, taxonomy).status == "none"


@pytest.mark.parametrize(
    ("card", "name", "groups"),
    [
        ("cub", "Black-footed Albatross", ("Albatross",)),
        ("cub", "Chuck-will's-widow", ("Chuck-will's-widow",)),
        ("cars", "Audi S4 Sedan 2007", ("Audi", "Audi S4 Sedan")),
        ("cars", "Land Rover LR2 SUV 2012", ("Land Rover", "Land Rover LR2 SUV")),
        ("cars", "Tesla Model S Sedan 2012", ("Tesla", "Tesla Model S Sedan")),
        ("aircraft", "737-200", ("Boeing", "737")),
        ("aircraft", "Spitfire", ()),
        ("beetles", "Drovia calpa", ("Drovia",)),
    ],
)
def test_the_cards_know_the_groups_of_their_classes(card, name, groups):
    assert data_cards.load(card).groups_of(name) == groups


@pytest.mark.parametrize("card", ["aircraft", "beetles", "cars", "cub"])
def test_every_cards_groups_can_be_told_apart(card):
    loaded = data_cards.load(card)
    taxonomy = Taxonomy.of(loaded)
    for group, names in loaded.taxonomy.items():
        assert taxonomy.group(group) == group
        assert set(names) <= set(loaded.classes)


def test_near_misses_are_counted_apart_from_the_rest():
    card = data_cards.load("beetles")
    truth, near, far = (card.classes.index(n) for n in ("Drovia calpa", "Drovia tindra", "Ostrix garim"))  # fmt: skip

    def row(class_id, answer=""):
        return {"mode": "one_step", "label": truth, "class_id": class_id, "answer": answer}

    rows = [row(truth), row(near), row(far), row(-1, "Drovia"), row(-1, "Kelmar"), row(-1)]
    counted = near_misses(rows, card)["one_step"]
    assert {key: counted[key] for key in ("images", "wrong", "near", "group_only")} == {
        "images": 6,
        "wrong": 5,
        "near": 2,
        "group_only": 1,
    }
    assert counted["share"] == 2 / 5
    assert counted["depth"] == pytest.approx((1 + 0.5 + 0.5) / 6)
    assert near_misses(rows, data_cards.load("pets")) == {}
