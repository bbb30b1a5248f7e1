"""The embedded set: its pictures come again, its species are lookalikes, its card tells what they are."""

import itertools
import time

import numpy as np
import pytest

import data_cards
from data_cards import beetles

LOOKS = dict(beetles.SPECIES)
BASE, NOVEL = beetles.CLASSES[:24], beetles.CLASSES[24:]


def test_the_card_says_what_the_pictures_show():
    card = data_cards.load("beetles")
    assert card.classes == beetles.CLASSES
    assert card.descriptions == {name: " ".join(look) for name, look in beetles.SPECIES}
    assert list(card.taxonomy) == list(beetles.GENERA)
    assert sorted(itertools.chain(*card.taxonomy.values())) == sorted(beetles.CLASSES)
    for genus, names in card.taxonomy.items():
        assert all(name.startswith(f"{genus} ") for name in names)
        assert sum(name in BASE for name in names) == sum(name in NOVEL for name in names) == 4


def test_names_say_nothing_of_looks():
    said = {word for name in beetles.CLASSES for word in name.lower().split()}
    assert not said & {word for words in beetles.TRAITS.values() for word in words}
    assert len({name.split()[1] for name in beetles.CLASSES}) == 48


def test_species_are_lookalikes_within_a_genus_and_none_looks_like_another():
    assert len(set(LOOKS.values())) == 48
    for half in (BASE, NOVEL):
        for name in half:
            nearest = min(
                sum(a != b for a, b in zip(LOOKS[name], LOOKS[other], strict=True))
                for other in half
                if other != name
            )
            assert nearest == 1, name
    for trait in range(len(beetles.TRAITS)):
        words = [{LOOKS[name][trait] for name in half} for half in (BASE, NOVEL)]
        assert words[0] == words[1]


def test_a_picture_depends_on_its_key_alone():
    first = np.asarray(beetles.draw(3, 7, 0, "train"))
    beetles.draw(4, 7, 0, "train")
    assert (np.asarray(beetles.draw(3, 7, 0, "train")) == first).all()
    for other in ((4, 7, 0, "train"), (3, 8, 0, "train"), (3, 7, 1, "train"), (3, 7, 0, "test")):
        assert (np.asarray(beetles.draw(*other)) != first).any(), other


def test_a_thousand_pictures_are_drawn_in_seconds():
    start = time.process_time()
    for number in range(100):
        beetles.draw(number % 48, number, 0, "speed")
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("taxonomy: [Red Kite]", "taxonomy must map a group"),
        ("taxonomy: {Milvus: [Black Kite]}", "taxonomy has 'Black Kite' in 'Milvus'"),
        ("taxonomy: {a: [Red Kite], b: [Red Kite]}", "names the class 'Red Kite' twice"),
        ("descriptions: [red]", "descriptions must map a class name"),
        ("descriptions: {Black Kite: dark}", "names 'Black Kite', which is not among the classes"),
        ("traits: [red]", "traits must map a trait to a list of words"),
        (
            "descriptions: {Red Kite: red tail, Buzzard: grey}\ntraits: {tail: [red, brown]}",
            r"description of 'Buzzard' must have one word of the trait 'tail' \(red, brown\), and it has 0",
        ),
        ("descriptions: {Red Kite: }", "the description of 'Red Kite' must be a text"),
    ],
)
def test_a_taxonomy_or_description_that_does_not_fit_is_named(tmp_path, monkeypatch, lines, told):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    card = tmp_path / "mine.md"
    text = (
        "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: x}\n"
        "classes: [Red Kite, Buzzard]\n"
    )
    card.write_text(f"{text}{lines}\n---\n")
    with pytest.raises(data_cards.CardError, match=told):
        data_cards.load("mine")
    card.write_text(
        f"{text}taxonomy: {{Milvus: [Red  Kite]}}\ndescriptions: {{Red Kite: forked}}\n---\n"
    )
    loaded = data_cards.load("mine")
    assert loaded.taxonomy == {"Milvus": ("Red Kite",)}
    assert loaded.descriptions == {"Red Kite": "forked"}


def test_a_look_is_read_from_a_description_whatever_its_case_and_commas(tmp_path, monkeypatch):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "mine.md").write_text(
        "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: x}\n"
        "classes: [Red Kite, Buzzard]\ntraits: {tail: [forked, long forked, round]}\n"
        "descriptions: {Red Kite: 'rusty, Long forked tail', Buzzard: round}\n---\n"
    )
    card = data_cards.load("mine")
    assert card.look("Red Kite") == {"tail": "long forked"}
    assert card.look("Buzzard") == {"tail": "round"}


def test_the_beetles_card_lists_the_traits_that_are_drawn():
    card = data_cards.load("beetles")
    assert card.traits == beetles.TRAITS
    for name, look in beetles.SPECIES:
        assert tuple(card.look(name).values()) == look
