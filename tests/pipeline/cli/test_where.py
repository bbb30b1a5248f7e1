"""Conditions on rows: what they mean, what they refuse, and that they reach nothing outside."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import where
from pipeline.cli.where import Condition, ConditionError, NoColumn
from tasks.runtime.errors import ShardError

PICTURE = {"bytes": b"png", "path": None}
ROWS = [
    {"id": "a", "votes": 3, "share": 0.5, "ok": True, "names": ["crow", "gull"], "rank": 1},
    {"id": "b", "votes": 7, "share": 0.1, "ok": False, "names": ["crowned crane"], "rank": None},
    {"id": "c", "votes": 7, "share": 0.9, "ok": True, "names": [], "rank": 2},
]
TABLE = pa.Table.from_pylist([row | {"image": PICTURE, "reward/letter": 0.5} for row in ROWS])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t-00000.parquet"
    pq.write_table(TABLE, path, write_page_checksum=True)
    return path


def ids(text: str, path) -> str:
    asked = Condition(text)
    asked.check(TABLE.schema)
    return "".join("abc"[row] for row in asked.rows(path))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # As filters were written before.
        ("votes == 7", "bc"),
        ("votes != 7", "a"),
        ("votes > 3 and share < 0.5", "b"),
        ("votes < 7 or share >= 0.9", "ac"),
        ("ok", "ac"),
        ("not ok", "b"),
        ("id in ['a', 'c']", "ac"),
        ("id not in ('a', 'c')", "b"),
        ("'crow' in names", "a"),
        ("rank is not null and rank > 1", "c"),
        ("len(names) == 0", "c"),
        ("share > -1", "abc"),
        ("'b' in id", "b"),
        ("  ( votes == 3 )  ", "a"),
        # And what else SQL says.
        ("rank IS NULL", "b"),
        ("VOTES = 7 AND Share BETWEEN 0 AND 0.5", "b"),
        ("id LIKE 'c%' -- the last one", "c"),
        ("\"reward/letter\" = 0.5 AND image.path IS NULL AND id > 'a'", "bc"),
        ("len(list_filter(names, lambda name: name LIKE 'crow%')) = 1", "ab"),
    ],
)
def test_a_condition_means_what_it_says(text, found, path):
    assert ids(text, path) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vote == 7", "no column 'vote'; did you mean votes"),
        ('id == "a"', "a text stands in single quotes: 'a'"),
        ("votes ==", "cannot be read"),
        ("rank is None", "write NULL in place of None"),
        ("0.2 < share <= 0.9", "Chained comparisons are not supported, use AND"),
        ("votes == 'seven'", "does not fit its columns"),
        ("7", "names no column"),
        ("", "cannot be read"),
        ("len(id, names) = 1", "does not fit its columns"),
        ("count(*) > votes", "cannot contain aggregates"),
        ("votes = ?", "does not fit its columns"),
        ("ok, votes", "single expression"),
        ("ok; DROP TABLE t", "more than one statement"),
        ("ok) OR (ok", "syntax error"),
        ("ok ORDER BY votes", "modifier"),
        ("__import__('os').system('true')", "cannot be read|does not fit|names no column"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_sentence(text, told, path):
    with pytest.raises(ConditionError, match=told) as caught:
        ids(text, path)
    assert "\n" not in str(caught.value)
    assert "--where" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "ok AND (SELECT count(*) FROM read_text('{path}')) > 0",
        "ok AND (SELECT count(*) FROM '{path}') > 0",
        "ok AND (SELECT count(*) FROM read_parquet('{path}')) > 0",
        "ok AND (SELECT count(*) FROM glob('{path}')) > 0",
        "ok AND (SELECT count(*) FROM sniff_csv('{path}')) > 0",
        "ok AND (SELECT count(*) FROM TABLE) > 0",
        "ok AND (SELECT count(*) FROM ROWS) > 0",
        "ok AND getenv('HOME') != ''",
    ],
)
def test_nothing_outside_the_table_is_reached(text, path):
    with pytest.raises(ConditionError):
        ids(text.replace("{path}", str(path)), path)


def test_no_setting_opens_what_is_closed():
    closed = Condition("ok")._connection
    for statement in ("SET enable_external_access = true", "INSTALL httpfs", "LOAD httpfs"):
        with pytest.raises(where.duckdb.Error):
            closed.execute(statement)
    with pytest.raises(where.duckdb.Error, match="disabled"):
        closed.execute("COPY (SELECT 1) TO '/tmp/out.csv'")


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text() | st.text("ok votes'\"()[]<>=,;.-*?$1", max_size=12))
def test_any_text_is_a_condition_or_a_sentence(path, text):
    told = ""
    try:
        ids(text, path)
    except ConditionError as error:
        told = str(error)
    assert "\n" not in told


def test_the_columns_of_a_condition_are_known_before_it_is_used():
    assert Condition("votes > 3 and len(names) == 1").columns == ["names", "votes"]
    with pytest.raises(NoColumn) as caught:
        Condition("votes > 3 and image_id = 'x'").check(TABLE.schema)
    assert caught.value.name == "image_id"


def test_only_what_it_names_is_read_and_a_batch_at_a_time(path, monkeypatch):
    asked = []

    def batches(path, columns, size):
        asked.append(columns)
        yield from pq.ParquetFile(path).iter_batches(size, columns=columns)

    monkeypatch.setattr(where, "BATCH_ROWS", 2)
    monkeypatch.setattr(where.shards, "iter_batches", batches)
    assert ids("image.path IS NULL AND Votes = 7", path) == "bc"
    assert asked == [["image.path", "votes"]]


@pytest.mark.parametrize("group", [0, 2])
def test_a_damaged_page_is_named_and_not_compared(tmp_path, monkeypatch, group):
    path = tmp_path / "t-00000.parquet"
    pq.write_table(TABLE, path, write_page_checksum=True, row_group_size=1)
    column = pq.read_metadata(path).row_group(group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(where, "BATCH_ROWS", 1)
    with pytest.raises(ShardError, match="is damaged"):
        Condition("votes > 3").rows(path)
