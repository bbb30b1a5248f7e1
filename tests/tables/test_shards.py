"""Shards: one writer for all tables; three readers agree; flipped bits are caught."""

import io

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.build_mcq import build_mcq
from tasks.questions.builder import pictures
from tasks.runtime.errors import ShardError
from tasks.tables import schemas, shards, writer
from tests.conftest import mcq_arguments, run_stage


@pytest.fixture
def tables(rollouts):
    """Every Parquet table that the stages without a model write."""
    out = rollouts.root / "mcq"
    out.mkdir()
    run_stage(build_mcq, out, **mcq_arguments(rollouts))
    return {
        "images": rollouts.download,
        "split": rollouts.split,
        "rollouts": rollouts.propose,
        "candidates": out,
        "mcq": out,
    }


def test_pandas_duckdb_and_datasets_read_every_table_alike(tables, tmp_path):
    from datasets import load_dataset

    for name, folder in tables.items():
        paths = [str(path) for path in shards.paths(folder, name)]
        frame = pd.concat([pd.read_parquet(path) for path in paths])
        counted = duckdb.sql(f"select count(*) from read_parquet({paths})").fetchall()[0][0]
        loaded = load_dataset("parquet", data_files=paths, split="train", cache_dir=str(tmp_path))
        assert len(frame) == counted == len(loaded)
        assert list(frame.columns) == loaded.column_names


def test_images_and_class_names_come_decoded(tables, tmp_path):
    from datasets import load_dataset

    for name in ("images", "mcq"):
        paths = [str(path) for path in shards.paths(tables[name], name)]
        loaded = load_dataset("parquet", data_files=paths, split="train", cache_dir=str(tmp_path))
        assert loaded[0]["image"].size == (84, 84)
    paths = [str(path) for path in shards.paths(tables["images"], "images")]
    loaded = load_dataset("parquet", data_files=paths, split="train", cache_dir=str(tmp_path))
    label = loaded.features["label"]
    assert label.int2str(loaded[0]["label"]) == loaded[0]["image_id"].split("/")[2]
    row = pd.read_parquet(paths[0]).iloc[0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (84, 84)


def test_a_flipped_bit_is_found_wherever_it_is(tables):
    path = shards.paths(tables["split"], "split")[0]
    whole = path.read_bytes()
    good = shards.read_file(path).to_pylist()
    for position in range(4, len(whole) - 4, max(1, len(whole) // 97)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        assert found_or_harmless(path, good), f"a flip at byte {position} read back as other rows"


def found_or_harmless(path, good) -> bool:
    try:
        return shards.read_file(path).to_pylist() == good
    except ShardError:
        return True


def test_a_table_without_rows_leaves_no_file_because_datasets_could_not_load_it(tmp_path):
    shards.write(tmp_path / "rejects.parquet", [], schemas.rejects())
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_leave_no_file(tmp_path):
    with pytest.raises(ShardError, match=r"rejects.parquet do not fit"):
        shards.write(tmp_path / "rejects.parquet", [{"path": 3, "reason": []}], schemas.rejects())
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(ShardError, match="holds no mcq shards"):
        shards.read(tmp_path, "mcq")


def photograph_row(number: int, size: int) -> dict:
    return {
        "image_id": f"few/{number}", "image": {"bytes": bytes(size), "path": str(number)},
        "sha256": "", "pixels": "", "dhash": number, "width": 1, "height": 1, "label": 0,
        "official_split": "",
    }  # fmt: skip


def test_a_shard_written_row_by_row_holds_few_of_them_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BYTES_PER_GROUP", 1000)
    path = tmp_path / "images.parquet"
    most = 0
    with shards.Writer(path, schemas.images(["a", "b"])) as written:
        for number in range(300):
            written.add(photograph_row(number, 300 if number < 40 else 1))
            most = max(most, len(written.rows))
    assert most <= writer.IMAGE_ROWS_PER_GROUP
    groups = pq.ParquetFile(path).metadata
    sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    assert sizes[:10] == [4] * 10, "large pictures fill a row group sooner"
    assert max(sizes[10:]) == 100
    assert shards.read_file(path)["dhash"].to_pylist() == list(range(300))


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    path = tmp_path / "images.parquet"

    def written(rows) -> None:
        with shards.Writer(path, schemas.images(["a", "b"])) as written:
            for row in rows:
                written.add(row)

    def until_interrupted():
        yield from (photograph_row(number, 10) for number in range(250))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(until_interrupted())
    with pytest.raises(ShardError):
        written([photograph_row(0, 10) | {"label": "not a number"}])
    assert list(tmp_path.iterdir()) == []


def test_photographs_are_not_compressed_a_second_time(tmp_path):
    path = tmp_path / "images.parquet"
    shards.write(path, [photograph_row(0, 1000)], schemas.images(["a", "b"]))
    group = pq.ParquetFile(path).metadata.row_group(0)
    used = {
        group.column(i).path_in_schema: group.column(i).compression
        for i in range(group.num_columns)
    }
    assert used["image.bytes"] == "UNCOMPRESSED"
    assert used["image_id"] == "ZSTD"


@pytest.mark.parametrize("given", ["rows", "table", "row by row"])
def test_a_shard_of_many_bytes_is_several_files_that_every_reader_takes(
    tmp_path, monkeypatch, given
):
    from datasets import load_dataset

    monkeypatch.setattr(writer, "BYTES_PER_GROUP", 1 << 20)
    monkeypatch.setattr(writer, "BYTES_PER_FILE", 4 << 20)
    schema = schemas.images(["a", "b"])
    rows = [photograph_row(number, 300_000) for number in range(100)]
    for index, part in enumerate((rows[:60], rows[60:])):
        path = shards.shard_path(tmp_path, "images", index)
        if given == "row by row":
            with shards.Writer(path, schema) as written:
                for row in part:
                    written.add(row)
        else:
            table = pa.Table.from_pylist(part, schema)
            shards.write(path, part if given == "rows" else table, schema)
    files = shards.paths(tmp_path, "images")
    assert [path.name for path in files[:3]] == [
        "images-00000.parquet",
        "images-00000_a.parquet",
        "images-00000_b.parquet",
    ]
    assert shards.parts(files[0]) == files[:5]
    for path in files:
        assert path.stat().st_size < 5 << 20
        groups = pq.ParquetFile(path).metadata
        assert {groups.row_group(i).num_rows for i in range(groups.num_row_groups)} == {4}
    assert shards.read(tmp_path, "images")["dhash"].to_pylist() == list(range(100))
    assert len(shards.ImageStore(tmp_path).read(["few/0", "few/59", "few/99"])) == 3
    names = [str(path) for path in files]
    assert pd.concat(map(pd.read_parquet, names))["dhash"].tolist() == list(range(100))
    assert duckdb.sql(f"select sum(dhash) from read_parquet({names})").fetchall() == [(4950,)]
    loaded = load_dataset("parquet", data_files=names, split="train", cache_dir=str(tmp_path / "c"))
    assert loaded["dhash"][:] == list(range(100))


def test_a_shard_of_several_files_appears_whole_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "BYTES_PER_GROUP", 1000)
    monkeypatch.setattr(writer, "BYTES_PER_FILE", 3000)
    path = tmp_path / "images-00000.parquet"

    def write(rows) -> None:
        with shards.Writer(path, schemas.images(["a"])) as written:
            for row in rows:
                written.add(row)

    rows = [photograph_row(number, 600) for number in range(120)]
    with pytest.raises(ShardError):
        write([*rows, {**rows[0], "label": "not a number"}])
    assert list(tmp_path.iterdir()) == []
    write(rows)
    assert len(shards.parts(path)) > 27, "letters do not run out"
    assert shards.read(tmp_path, "images")["dhash"].to_pylist() == list(range(120))


def test_questions_with_more_photographs_than_one_arrow_array_holds():
    """Two gigabytes in one array made Arrow return several, which a struct does not take."""
    photograph = bytes(256 << 20)
    kind = schemas.mcq().field("image").type
    column = pictures(
        [str(n) for n in range(9)], dict.fromkeys(map(str, range(9)), photograph), kind
    )
    assert column.nbytes > 2**31
    assert len(column) == 9
    assert column.type == kind


def test_a_text_that_cannot_be_encoded_leaves_no_empty_file(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        shards.write_text(tmp_path / "mine.md", "half a character: \udce9")
    assert list(tmp_path.iterdir()) == []
