"""Filters over rows: what they mean, what they refuse, and that nothing in them is evaluated."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.where import WhereError, columns, expression

ROWS = [
    {"id": "a", "votes": 3, "share": 0.5, "ok": True, "names": ["crow", "gull"], "rank": 1},
    {"id": "b", "votes": 7, "share": 0.1, "ok": False, "names": ["crowned crane"], "rank": None},
    {"id": "c", "votes": 7, "share": 0.9, "ok": True, "names": [], "rank": 2},
]
TABLE = pa.Table.from_pylist(ROWS)


def ids(text: str) -> str:
    return "".join(TABLE.filter(expression(text, TABLE.schema))["id"].to_pylist())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("votes == 7", "bc"),
        ("votes != 7", "a"),
        ("votes > 3 and share < 0.5", "b"),
        ("votes < 7 or share >= 0.9", "ac"),
        ("0.2 < share <= 0.9", "ac"),
        ("ok", "ac"),
        ("not ok", "b"),
        ("id in ['a', 'c']", "ac"),
        ("id not in ('a', 'c')", "b"),
        ("'crow' in names", "a"),
        ("rank is None", "b"),
        ("rank is not None and rank > 1", "c"),
        ("len(names) == 0", "c"),
        ("share > -1", "abc"),
        ("'b' in id", "b"),
        ("  ( votes == 3 )  ", "a"),
    ],
)
def test_a_filter_means_what_it_says(text, found):
    assert ids(text) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vote == 7", "no column 'vote'; did you mean votes"),
        ("votes ==", "cannot be read"),
        ("votes == 'seven'", "does not fit its columns"),
        ("7", "names no column"),
        ("__import__('os').system('true')", "there is no column '__import__'"),
        ("votes.__class__ == 1", "does not understand"),
        ("[v for v in votes]", "does not understand|no column"),
        ("open(id)", "no column 'open'"),
        ("len(id, names)", "does not understand"),
        ("votes == (lambda: 1)", "does not understand"),
        ("votes == b'x'", "does not understand"),
        ("f'{votes}' == id", "does not understand"),
        ("(votes := 3) == 3", "does not understand"),
    ],
)
def test_what_is_no_filter_is_refused_in_one_sentence(text, told):
    with pytest.raises(WhereError, match=told) as caught:
        ids(text)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_any_text_is_a_filter_or_a_sentence(text):
    try:
        ids(text)
    except WhereError:
        return


def test_the_columns_of_a_filter_are_known_before_it_is_used():
    assert columns("votes > 3 and len(names) == 1") == ["names", "votes"]
