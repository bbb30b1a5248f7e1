"""Shards: one writer for all tables; three readers agree; flipped bits are caught."""

import io

import duckdb
import pandas as pd
import pytest
from PIL import Image

from tasks import schemas, shards
from tasks.build_mcq import build_mcq
from tests.conftest import mcq_arguments


@pytest.fixture
def tables(rollouts):
    """Every Parquet table that the stages without a model write."""
    out = rollouts.root / "mcq"
    out.mkdir()
    build_mcq(out, **mcq_arguments(rollouts))
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
    except shards.ShardError:
        return True


def test_a_table_without_rows_leaves_no_file_because_datasets_could_not_load_it(tmp_path):
    shards.write(tmp_path / "rejects.parquet", [], schemas.rejects())
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_leave_no_file(tmp_path):
    with pytest.raises(shards.ShardError, match=r"rejects.parquet do not fit"):
        shards.write(tmp_path / "rejects.parquet", [{"path": 3, "reason": []}], schemas.rejects())
    assert list(tmp_path.iterdir()) == []


def test_missing_shards_are_named(tmp_path):
    with pytest.raises(shards.ShardError, match="holds no mcq shards"):
        shards.read(tmp_path, "mcq")
