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
CARDS = sorted(path.stem for path in data_cards.FOLDER.glob("*.md"))
# Names as the archives, common usage or CoOp write them, and the class they must reach.
SPELLINGS = {
    "cub": {
        "Black_footed_Albatross": "Black-footed Albatross",
        "Artic Tern": "Arctic Tern",
        "Chuck will Widow": "Chuck-will's-widow",
        "fulmar": "Northern Fulmar",
        "frigate bird": "Frigatebird",
        "Fregata spp.": "Frigatebird",
        "Dendroica coronata": "Myrtle Warbler",
        "american goldfinch (carduelis tristis)": "American Goldfinch",
    },
    "flowers": {
        "barberton daisy": "barbeton daisy",
        "guernsey lily": "cape flower",
        "nerine bowdenii": "cape flower",
        "plumed celosia": "prince of wales feathers",
        "celosia": "prince of wales feathers",
        "Nasturtium": "watercress",
        "tropaeolum majus": "watercress",
        "nymphaea": "water lily",
        "rosa": "rose",
        "tagetes erecta": "marigold",
        "passiflora": "passion flower",
        "zantedeschia": "giant white arum lily",
        "cynara": "artichoke",
        "aconitum napellus": "monkshood",
        "cyclamen persicum": "cyclamen",
        "gloriosa": "fire lily",
        "gloriosa lily (gloriosa superba)": "fire lily",
        "helleborus orientalis": "lenten rose",
        "petunia x hybrida": "petunia",
        "petunia × hybrida": "petunia",
        "matilija poppy": "tree poppy",
        "digitalis": "foxglove",
        "monarda didyma": "bee balm",
        "camellia japonica": "camellia",
        "erysimum cheiri": "wallflower",
        "muscari armeniacum": "grape hyacinth",
        "love-in-a-mist": "love in the mist",
        "echinops ritro": "globe thistle",
        "trollius europaeus": "globe-flower",
        "oenothera speciosa": "pink primrose",
        "calendula officinalis (pot marigold)": "english marigold",
        "nuphar lutea (water lily)": "water lily",
    },
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


@pytest.mark.parametrize("name", CARDS)
def test_every_name_and_alias_of_a_card_reaches_its_own_class_alone(name):
    """An alias that fits two classes reaches neither, in the singular or plural, with or without remarks."""
    card = data_cards.load(name)
    known = ClassNames.of(card)
    for label, class_name in enumerate(card.classes):
        for text in (class_name, *card.aliases.get(class_name, ())):
            assert known.match(text).class_id == label, text
            plural = known.match(f"the {text.removesuffix(' sp.')}s")
            assert plural.class_id in (label, None), text
            assert plural.step != "ambiguous", text
    for text, class_name in SPELLINGS.get(name, {}).items():
        assert known.match(text).class_id == card.classes.index(class_name), text


@pytest.mark.parametrize("name", CARDS)
def test_a_genus_is_an_alias_only_where_no_other_class_belongs_to_it(name):
    card = data_cards.load(name)
    genera = {
        alias.removesuffix(" sp."): class_name
        for class_name, aliases in card.aliases.items()
        for alias in aliases
        if alias.endswith(" sp.")
    }
    assert bool(genera) == (name in ("cub", "flowers"))
    for class_name in card.classes:
        for text in (class_name, *card.aliases.get(class_name, ())):
            assert genera.get(text.split()[0], class_name) == class_name, text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("flowers", "malva"),
        ("flowers", "Iris sp."),
        ("cub", "Tyrannus sp."),
        ("cub", "black ani (crotophaga sulcirostris)"),
        ("cub", "song sparrow (melospiza lincolnii)"),
        ("cub", "american goldfinch (Carduelis carduelis)"),
    ],
)
def test_what_several_classes_share_or_contradicts_itself_is_no_name(name, text):
    assert ClassNames.of(data_cards.load(name)).match(text).class_id is None


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no front matter", "must begin with YAML front matter between two lines of ---"),
        ("---\nversion: 1\n---\n", "'noun' is missing"),
        ("---\nversoin: 1\n---\n", "unknown key 'versoin'"),
        ("---\n[\n---\n", "not valid YAML"),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: web}\nclasses: [x, y]\n---\n",
            "source.kind",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p}\nclasses: [x, no]\n---\n",
            "quote",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p}\nclasses: [x, x]\n---\n",
            "distinct",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p}\nclasses: [x, z]\n"
            "aliases: {x: why}\n---\n",
            "aliases of 'x' must be a list",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p}\nclasses: [x, z]\n"
            "aliases: {x: [007]}\n---\n",
            "aliases of 'x' must be texts; YAML reads one as 7: put it between",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p, folders: {007: x}}\n"
            "classes: [x, z]\n---\n",
            "source.folders must map .* YAML reads one as 7",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder}\nclasses: [x, z]\n---\n",
            "source of kind folder lacks the key 'path'",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p, pth: q}\n"
            "classes: [x, z]\n---\n",
            "has no key 'pth'",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nlicense: Do what you like\n"
            "source: {kind: folder, path: p}\nclasses: [x, z]\n---\n",
            "license must be an identifier",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nname_in_parentheses: perhaps\n"
            "source: {kind: folder, path: p}\nclasses: [x, z]\n---\n",
            "name_in_parentheses must be true or false; got 'perhaps'",
        ),
        (
            "---\nversion: 1\nnoun: [a]\nkind: b\nsource: {kind: folder, path: p}\n"
            "classes: [x, z]\n---\n",
            "noun must be a word",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: folder, path: p}\n"
            "classes: [x, z]\nofficial_splits: {dev: 3}\n---\n",
            "official_splits must map",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: archive, layout: cub, "
            "files: [{name: x, md5: a}], mirror: {revision: z}}\nclasses: [x, z]\n---\n",
            "source.mirror has repo",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: archive, layout: zoo, files: []}\n"
            "classes: [x, z]\n---\n",
            "source.layout must be one of cub",
        ),
        (
            "---\nversion: 1\nnoun: a\nkind: b\nsource: {kind: archive, layout: cub, "
            "files: [{name: ../x, md5: a}]}\nclasses: [x, z]\n---\n",
            "not a plain file name",
        ),
    ],
)
def test_a_broken_card_says_what_is_wrong(tmp_path, monkeypatch, text, told):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "broken.md").write_text(text)
    with pytest.raises(data_cards.CardError, match=told):
        data_cards.load("broken")


CARD = (
    "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: p}\n"
    "classes: [Käfer, kite]\n---\nWhat people should know --- about it.\n"
)


@pytest.mark.parametrize(
    "data",
    [
        CARD.replace("\n", "\r\n").encode(),
        CARD.encode("utf-8-sig"),
        CARD.replace("\n", "\r\n").encode("utf-8-sig"),
        CARD.replace("\n", "\r").encode(),
        b"\n\n" + CARD.encode(),
        CARD.replace("---\n", "--- \t\n").encode(),
        CARD.partition("What")[0].rstrip().encode(),  # no line end after the last ---
        CARD.partition("What")[0].replace("[Käfer, kite]", "\n- Käfer --- \n- kite").encode(),
    ],
    ids=["crlf", "bom", "both", "cr", "blank lines", "spaces", "no end", "dashes in a value"],
)
def test_a_card_is_read_however_an_editor_saves_it(tmp_path, monkeypatch, data):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "mine.md").write_bytes(data)
    assert data_cards.load("mine").classes[1] == "kite"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_card_of_another_encoding_is_a_sentence(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "mine.md").write_bytes(CARD.encode(encoding))
    with pytest.raises(data_cards.CardError, match=r"mine\.md is not UTF-8 .*; save it as UTF-8"):
        data_cards.load("mine")
