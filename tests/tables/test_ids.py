"""Image ids in little memory: found as a dictionary finds them, also where two have one hash."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from tasks.tables import ids as module
from tasks.tables import schemas, shards
from tasks.tables.ids import Ids, Index, Labels
from tasks.tables.split_table import Rows

NAMES = [f"few/{number:03d} ä" for number in range(200)]
OTHERS = [f"few/{number:03d}" for number in range(50)]


@pytest.fixture(params=["own hashes", "seven hashes", "one hash"])
def hashing(request, monkeypatch) -> None:
    """With few hashes, ids collide as no two of a million ids would."""
    if request.param != "own hashes":
        count = np.uint64(7 if request.param == "seven hashes" else 1)
        real = module.hashes
        for place in (module, shards):
            monkeypatch.setattr(place, "hashes", lambda ids: real(ids) % count)


@pytest.mark.usefixtures("hashing")
@pytest.mark.parametrize("chunk", [1, 37, 1000])
def test_ids_are_found_as_in_a_dictionary(chunk):
    mixed = [*NAMES[100:], *NAMES[:100]]
    wanted = {name: number for number, name in enumerate(mixed)}
    ids = Ids(pa.chunked_array([pa.array(part) for part in shards.chunks(mixed, chunk)]))
    asked = [*OTHERS, *NAMES, *OTHERS]
    expected = [wanted.get(name, -1) for name in asked]
    assert ids.positions(Ids(asked)).tolist() == expected
    assert [ids.position(name) for name in asked] == expected
    labels = Labels(ids, [number % 5 for number in range(len(mixed))])
    assert dict(labels) == {name: number % 5 for name, number in wanted.items()}
    assert (len(labels), NAMES[3] in labels, OTHERS[0] in labels) == (200, True, False)
    with pytest.raises(KeyError, match="few/000"):
        labels[OTHERS[0]]


def test_ids_are_a_sequence_whose_slices_share_its_memory():
    ids = Ids(iter(NAMES))
    assert list(ids) == NAMES
    assert (ids[3], ids[-1], len(ids[10:20]), list(ids[190:500])) == (
        NAMES[3], NAMES[-1], 10, NAMES[190:],
    )  # fmt: skip
    one, other = (each.texts.chunk(0).buffers()[2].address for each in (ids, ids[10:20]))
    assert one == other
    assert ids == Ids(NAMES) != Ids(NAMES[1:])
    for empty in (Ids([]), ids[5:5]):
        assert (list(empty), empty.positions(Ids(NAMES)).max()) == ([], -1)


def test_another_process_gets_no_more_than_the_slice():
    many = Ids([*NAMES, *(f"far/{number}" for number in range(20_000))])
    sent = pickle.dumps(many[:10])
    assert len(sent) < 1000
    assert pickle.loads(sent) == many[:10]
    labels = pickle.loads(pickle.dumps(Labels(many[:3], [4, 5, 6])))
    assert labels == dict(zip(NAMES, [4, 5, 6], strict=False))
    assert type(labels) is dict


def test_an_index_of_nothing_finds_nothing():
    empty = Index(np.empty(0, np.uint64), np.empty(0, np.int32))
    assert empty.first(module.hashes(NAMES)).max() == -1
    assert empty.every(np.uint64(1)) == []


@pytest.mark.usefixtures("hashing")
def test_images_are_read_by_id_and_a_missing_one_is_named(tmp_path):
    for index, part in enumerate(shards.chunks(NAMES, 30)):
        rows = [
            {
                "image_id": name, "image": {"bytes": name.encode(), "path": name},
                "sha256": "", "pixels": "", "dhash": 0, "width": number, "height": 2,
                "label": 0, "official_split": "",
            }
            for number, name in enumerate(part)
        ]  # fmt: skip
        shards.write(shards.shard_path(tmp_path, "images", index), rows, schemas.images(["a"]))
    store = shards.ImageStore(tmp_path)
    for wanted in (NAMES, NAMES[::-7], NAMES[:1] * 3, []):
        assert store.read(wanted) == {name: name.encode() for name in wanted}
    for lost in ([OTHERS[1], NAMES[0], OTHERS[0]], [OTHERS[0], OTHERS[1]]):
        with pytest.raises(shards.ShardError, match=r"2 images are not in .* first: few/000$"):
            store.read(lost)


def test_the_largest_images_are_found_and_those_that_are_not_there(tmp_path):
    rows = [
        {
            "image_id": name, "image": {"bytes": b"", "path": name}, "sha256": "", "pixels": "",
            "dhash": 0, "width": number % 30, "height": 2, "label": 0, "official_split": "",
        }
        for number, name in enumerate(NAMES)
    ]  # fmt: skip
    for index, part in enumerate(shards.chunks(rows, 45)):
        shards.write(shards.shard_path(tmp_path, "images", index), part, schemas.images(["a"]))
    found = shards.largest_images(tmp_path, module.hashes([*NAMES[:70], *NAMES[:2]]), 3)
    assert found == ([NAMES[29], NAMES[59], NAMES[28]], set())
    found = shards.largest_images(tmp_path, module.hashes([OTHERS[1], NAMES[4], *OTHERS[:2]]), 3)
    assert found == ([NAMES[4]], set(module.hashes(OTHERS[:2]).tolist()))


def test_digests_of_several_pictures_are_known_and_no_others(tmp_path):
    digests = [f"{number:064x}"[::-1] for number in (1, 2, 3, 2, 5, 2, 5)]
    rows = [
        {
            "image_id": str(number), "image": {"bytes": b"", "path": ""}, "sha256": digest,
            "pixels": "", "dhash": 0, "width": 1, "height": 1, "label": 0, "official_split": "",
        }
        for number, digest in enumerate(digests)
    ]  # fmt: skip
    shards.write(shards.shard_path(tmp_path, "images", 0), rows[:3], schemas.images(["a"]))
    shards.write(shards.shard_path(tmp_path, "images", 1), rows[3:], schemas.images(["a"]))
    repeated = shards.repeated_bytes(tmp_path)
    assert [repeated(digest) for digest in digests] == [d[0] in "25" for d in digests]


def test_rows_of_split_are_a_sequence_of_dictionaries():
    labels = [3, None, 1, 3, -1]
    listed = [
        {"image_id": name, "label": label, "group": "base"}
        for name, label in zip(NAMES, labels, strict=False)
    ]
    rows = Rows(pa.Table.from_pylist(listed))
    assert list(rows) == listed == [rows[number] for number in range(5)]
    assert (rows[-1], list(rows[1:3]), len(rows[4:9])) == (listed[-1], listed[1:3], 1)
    assert (rows.classes, list(rows.ids)) == ([1, 3], NAMES[:5])
    assert dict(rows.labels) == dict(zip(NAMES, [3, -1, 1, 3, -1], strict=False))
    assert list(rows.labelled()) == [listed[0], listed[2], listed[3]]
    assert list(rows.without({NAMES[0], NAMES[3]})) == [listed[1], listed[2], listed[4]]
    assert rows.without(set()) is rows
    assert list(rows[2:].ids) == NAMES[2:5]
