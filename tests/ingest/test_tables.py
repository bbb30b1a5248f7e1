"""A table of paths as a source of images."""

import json

import pandas as pd
import pytest

import data_cards
from tasks.download import download
from tasks.ingest import sources
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage
from tests.ingest.test_hub import picture


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Write photographs and a table of them, with a card over it; returns the table's path."""
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "out").mkdir()

    def make(rows: list[dict[str, str]], kind: str = "csv"):
        for number, row in enumerate(rows):
            if "path" in row and "gone" not in row["path"]:
                (tmp_path / row["path"]).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / row["path"]).write_bytes(picture(number))
        path = tmp_path / f"photos.{kind}"
        frame = pd.DataFrame(rows)
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
        (tmp_path / "mine.md").write_text(
            f"---\nversion: 1\nnoun: bird\nkind: species\nsource: {{kind: folder, path: {path}}}\n"
            "classes: [Red Kite, Buzzard]\n---\n"
        )
        return path

    return make


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_paths_is_a_source_and_a_missing_file_a_reject(table, tmp_path, kind):
    table(
        [
            {"path": "a/1.jpg", "class": "red_kite", "split": "train"},
            {"path": "a/2.jpg", "class": "Buzzard", "split": "validation"},
            {"path": "a/gone.jpg", "class": "Buzzard", "split": "test"},
        ],
        kind,
    )
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.5)
    rows = shards.read(tmp_path / "out", "images").to_pylist()
    found = [(r["image_id"], r["label"], r["official_split"]) for r in rows]
    assert found == [("mine/a/1.jpg", 0, "train"), ("mine/a/2.jpg", 1, "val")]
    rejects = shards.read_file(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert rejects == [{"path": "a/gone.jpg", "reason": "listed, but there is no such file"}]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"file": "a.jpg", "class": "Buzzard"}], "no column 'path'; it has file, class"),
        ([{"path": "a.jpg", "class": "Osprey"}], "row 1: no class 'Osprey' in card mine"),
        (
            [{"path": "a.jpg", "class": "Buzzard", "split": "holdout"}],
            "row 1: split 'holdout' is none of train, val, validation, test",
        ),
        ([{"path": "a.jpg", "class": "Buzzard"}] * 2, r"row 2: a\.jpg comes twice"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(table, tmp_path, rows, told):
    table(rows)
    with pytest.raises(StageError, match=told):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


@pytest.mark.parametrize("ending", ["csv", "CSV", "parquet"])
def test_cells_stay_the_texts_that_they_are(table, tmp_path, ending):
    """No class is taken for an empty cell or for a number."""
    names = ["NA", "None", "null", "nan", "007", "7", "3.10", "3.1", "1e5", "True", "2012-01-01"]
    splits = ["Train", "TEST", "validation", "Test_Set", "", "training", "val", "", "", "", ""]
    rows = [
        {"path": f"{n}.jpg", "class": name, "split": split}
        for n, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    path = table(rows, ending.lower()).rename(tmp_path / f"photos.{ending}")
    if ending != "parquet":  # as a spreadsheet program saves it
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    (tmp_path / "mine.md").write_text(
        f"---\nversion: 1\nnoun: bird\nkind: species\nsource: {{kind: folder, path: {path}}}\n"
        f"classes: {json.dumps(names)}\n---\n"
    )
    source = sources.open_source(data_cards.load("mine"), tmp_path, tmp_path)
    assert [(i.path, i.label) for i in source.items(0)] == [(f"{n}.jpg", n) for n in range(11)]
    kinds = ["train", "test", "val", "test", "", "train", "val", "", "", "", ""]
    assert [item.official_split for item in source.items(0)] == kinds


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(("column", "empty"), [("class", None), ("class", " "), ("path", "")])
def test_an_empty_cell_is_named_by_table_and_row(table, tmp_path, kind, column, empty):
    rows = [{"path": f"gone{n}.jpg", "class": "Buzzard"} for n in range(3)]
    path = table(rows, kind)
    frame = pd.DataFrame([*rows[:2], {**rows[2], column: empty}])
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    with pytest.raises(StageError, match=f"{path}, row 3: the cell of '{column}' is empty"):
        sources.open_source(data_cards.load("mine"), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"path,class\na.jpg\n", "row 1: the cell of 'class' is empty"),
        (b"path,class\na.jpg,kite, red\n", "'a.jpg' has more cells than the header; put a text"),
        ("path,class\na.jpg,Käfer\n".encode("latin-1"), r"photos\.csv is not UTF-8; save it as"),
        (b'path,class\n"a.jpg,Buzzard\n', "photos.csv cannot be read: "),
        (b"", "has no column 'path'"),
    ],
)
def test_a_table_with_a_fault_in_its_text_says_which(table, tmp_path, data, reason):
    table([{"path": "a.jpg", "class": "Buzzard"}]).write_bytes(data)
    with pytest.raises(StageError, match=reason):
        sources.open_source(data_cards.load("mine"), tmp_path, tmp_path)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_a_few_rows_at_a_time_and_a_path_that_comes_twice_is_found(
    table, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(sources, "ROWS", 2)
    splits = ["", "", "train", "", "test"]
    rows = [
        {"path": f"a/{n}.jpg", "class": ["Red Kite", "Buzzard"][n % 2], "split": part}
        for n, part in enumerate(splits)
    ]
    table(rows, kind)
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)
    found = shards.read(tmp_path / "out", "images").to_pylist()
    assert [r["image_id"] for r in found] == [f"mine/a/{n}.jpg" for n in range(5)]
    assert [r["label"] for r in found] == [0, 1, 0, 1, 0]
    assert [r["official_split"] for r in found] == splits
    table([*rows, rows[1]], kind)
    with pytest.raises(StageError, match=r"row 6: a/1\.jpg comes twice"):
        sources.open_source(data_cards.load("mine"), tmp_path, tmp_path)
    table([*rows, {**rows[1], "class": "Osprey"}], kind)
    with pytest.raises(StageError, match="row 6: no class 'Osprey' in card mine"):
        sources.open_source(data_cards.load("mine"), tmp_path, tmp_path)
