"""The cards that come with the project, and datasets in hub layout."""

import re

import pytest

import data_cards
from tasks.download import download
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError
from tasks.tables.split_table import base_count
from tests.conftest import run_stage

# Card: classes, base, last base class and first novel class (CoOp's protocol).
BENCHMARKS = {
    "cub": (200, 100, "Brown Pelican", "White Pelican"),
    "flowers": (102, 51, "petunia", "wild pansy"),
    "pets": (37, 19, "Keeshond", "Leonberger"),
    "cars": (196, 98, "Eagle Talon Hatchback 1998", "FIAT 500 Abarth 2012"),
    "aircraft": (100, 50, "Cessna 525", "Cessna 560"),
}
# Names as the archives, common usage or CoOp write them, and the class they must reach.
SPELLINGS = {
    "cub": {
        "Black_footed_Albatross": "Black-footed Albatross",
        "Artic Tern": "Arctic Tern",
        "Chuck will Widow": "Chuck-will's-widow",
    },
    "flowers": {"barberton daisy": "barbeton daisy"},
    "pets": {
        "american_bulldog": "American Bulldog",
        "german_shorthaired": "German Shorthaired Pointer",
    },
    "cars": {
        "2012 Acura RL Sedan": "Acura RL Sedan 2012",
        "acura rl sedan 2012": "Acura RL Sedan 2012",
    },
    "aircraft": {"F/A-18": "F/A-18", "Boeing 707-320": "707-320"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_card_has_the_official_classes_in_their_order(name):
    card = data_cards.load(name)
    count, base, last, first = BENCHMARKS[name]
    assert len(card.classes) == count
    assert base_count(count, "base_to_novel") == base
    assert (card.classes[base - 1], card.classes[base]) == (last, first)
    assert card.redistribute is False
    assert "/" in card.source["mirror"]["repo"]
    assert card.source.get("crop_bottom", 0) == (20 if name == "aircraft" else 0)
    for file in card.source["files"]:
        assert re.fullmatch(r"[0-9a-f]{32}", file["md5"])
        assert file.get("url", "https://").startswith("https://")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_name_and_alias_of_a_card_reaches_its_own_class(name):
    card = data_cards.load(name)
    known = ClassNames(card.classes, card.aliases)
    for label, class_name in enumerate(card.classes):
        for text in (class_name, *card.aliases.get(class_name, ())):
            assert known.match(text).class_id == label, text
    for text, class_name in SPELLINGS[name].items():
        assert known.match(text).class_id == card.classes.index(class_name), text


def test_cars_says_that_its_host_is_gone_and_what_to_do(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match=r"cars_train\.tgz.*can no longer be downloaded.*archives"):
        run_stage(
            download,
            tmp_path / "out",
            card="cars",
            max_reject_share=0.0,
            archives=tmp_path / "archives",
        )
