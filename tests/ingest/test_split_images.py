"""What Split keeps of images: a few numbers each, and texts that are read again block by block."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.ingest import split_images
from tasks.ingest.duplicates import repeated
from tasks.ingest.split_images import Column, read_images
from tasks.runtime.errors import ShardError
from tasks.split import find_duplicates, split
from tasks.tables import schemas, shards
from tests.conftest import run_stage
from tests.test_split import codes, columns


def test_a_column_is_read_for_the_rows_asked_for_and_no_other_shard_is_opened(split_set):
    ids = shards.read(split_set.download, "images")["image_id"]
    for index, part in enumerate((ids[:100], ids[100:101], ids[101:])):
        path = shards.shard_path(split_set.root, "some", index)
        shards.write(path, pa.table({"image_id": part}), pa.schema([("image_id", pa.string())]))
    column = Column(split_set.root, "some", "image_id")
    assert len(column) == 320
    for rows in ([], [0], [99, 100, 101], [100], [5, 200, 319], range(320)):
        taken = column.take(np.array(rows, np.int64))
        assert taken.to_pylist() == [ids[row].as_py() for row in rows]
    shards.shard_path(split_set.root, "some", 1).write_bytes(b"damaged")
    assert column.take(np.array([99, 101])).to_pylist() == [ids[99].as_py(), ids[101].as_py()]
    with pytest.raises(ShardError, match=r"some-00001\.parquet is damaged"):
        column.take(np.array([100]))
    with pytest.raises(ShardError, match=r"some-00001\.parquet is damaged"):
        Column(split_set.root, "some", "image_id")


@pytest.mark.parametrize(
    "changed", [{}, {"shots": 2}, {"train_caps": {"*": 33}}, {"protocol": "all"}]
)
def test_in_small_blocks_the_same_comes_out(split_set, monkeypatch, changed):
    """Images without official splits, each class's all over the shards, as no folder has them."""
    table = shards.read(split_set.download, "images")
    names = split_set.card.classes
    rows = sorted(
        table.to_pylist(), key=lambda row: hashlib.sha256(row["image_id"].encode()).digest()
    )
    (split_set.root / "mixed").mkdir()
    for index, part in enumerate(shards.chunks([{**r, "official_split": ""} for r in rows], 30)):
        path = shards.shard_path(split_set.root / "mixed", "images", index)
        shards.write(path, part, schemas.images(names))

    def made(name: str) -> pq.ParquetFile:
        (split_set.root / name).mkdir()
        arguments = {
            "card": "few", "download": split_set.root / "mixed", "protocol": "base_to_novel",
            "test_share": 0.3, "val_share": 0.2, "pretrain_share": 0.1, "seed": 4,
        }  # fmt: skip
        run_stage(split, split_set.root / name, **arguments | changed)
        return pq.ParquetFile(split_set.root / name / "split.parquet")

    whole = made("whole")
    monkeypatch.setattr(split_images, "BLOCK", 50)
    blocks = made("blocks")
    assert blocks.read().equals(whole.read(), check_metadata=True)
    assert (whole.num_row_groups, blocks.num_row_groups) == (1, 7)


def test_what_is_kept_of_an_image_is_what_download_wrote(split_set):
    images = read_images(split_set.download, with_dhash=True)
    rows = shards.read(split_set.download, "images").to_pylist()
    assert images.labels.tolist() == [row["label"] for row in rows]
    assert [images.parts[code] for code in images.official] == [r["official_split"] for r in rows]
    assert images.dhash.view(np.int64).tolist() == [row["dhash"] for row in rows]
    assert len(np.unique(images.keys)) == len({row["pixels"] for row in rows})
    assert not len(read_images(split_set.download, with_dhash=False).dhash)
    kept = (images.labels, images.official, images.keys, images.dhash)
    assert sum(column.itemsize for column in kept) == 22, "bytes an image"


def test_pictures_whose_keys_are_equal_by_chance_are_told_apart():
    given = [
        {"image_id": name, "pixels": pixels, "label": 0, "split": part}
        for name, pixels, part in (
            ("a", "1", "train"), ("b", "2", "test"), ("c", "1", "test"), ("d", "3", "test")
        )
    ]  # fmt: skip
    images = columns(given)
    images.keys[:3] = 7
    everywhere = np.ones(4, bool)
    assert repeated(images.keys, everywhere).tolist() == [0, 1, 2]
    everywhere[1] = False
    assert repeated(images.keys, everywhere).tolist() == [0, 2]
    (pair,) = find_duplicates(images, codes(given), 0).to_pylist()
    assert (pair["image_id"], pair["twin_id"]) == ("c", "a")
