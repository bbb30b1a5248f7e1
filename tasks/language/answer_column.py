"""Reads the answers in a column of completions: the vectorised fast path of `answers.parse`.

Nearly every completion has its tags once and in order. Those are read with array operations on the
column's bytes. All others go through `parse`, so the result is that of `parse` for each row.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.language import answers

TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>")
_THINK, _THOUGHT, _ANSWER, _ANSWERED = 1, 2, 3, 4
_ORDERS = ((3, 4), (1, 3, 4), (2, 3, 4), (1, 2, 3, 4))  # the orders of tags that need no parser
_LONGEST = max(map(len, TAGS))


@dataclass(frozen=True)
class Answers:
    """The distinct answers of a column.

    `codes` (int64, one a row) index both lists. `texts` are stripped, and None where there is no
    readable answer; `problems` then holds the problem of `tasks.language.answers.Parsed`, else "".
    """

    texts: list[str | None]
    problems: list[str]
    codes: NDArray[np.int64]


def read_answers(completions: pa.Array) -> Answers:
    """Parse a column of strings, null as "". Takes time linear in its bytes."""
    if not len(completions):
        return Answers([], [], np.empty(0, np.int64))
    column = completions.cast(pa.string()).fill_null("")
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
    raw = column.buffers()[2]
    data = np.frombuffer(raw if raw is not None else b"", np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]  # a slice of a column shares the whole column's bytes
    starts, ends = _plain_answers(data, offsets)
    plain = starts >= 0
    encoded = _slices(data, starts[plain], ends[plain]).dictionary_encode()
    known: dict[tuple[str | None, str], int] = {}
    codes = np.empty(len(column), np.int64)
    read = [_code(known, *_stripped(text)) for text in encoded.dictionary.to_pylist()]
    codes[plain] = np.array(read, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
    for row in np.flatnonzero(~plain):
        parsed = answers.parse(column[int(row)].as_py())
        codes[row] = _code(known, parsed.answer, parsed.problem)
    return Answers([text for text, _ in known], [problem for _, problem in known], codes)


def _plain_answers(
    data: NDArray[np.uint8], offsets: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The byte offsets in `data` at which each row's answer begins and ends; -1: needs the parser.

    `data` holds the bytes of all rows; row i begins at `offsets[i]`.
    """
    rows = len(offsets) - 1
    at = np.flatnonzero(data == ord("<"))
    owner = np.searchsorted(offsets, at, side="right") - 1
    # Eight bytes as one number, so that most of a tag is compared at once.
    padded = np.concatenate([data, np.zeros(_LONGEST, np.uint8)])
    words = np.ndarray((len(data) + 1,), "<u8", padded, strides=(1,))[at]
    kind = np.zeros(len(at), np.int64)
    for number, tag in enumerate(TAGS, 1):
        head = int.from_bytes(tag[:8], "little")
        same = (words & np.uint64(2 ** (8 * min(len(tag), 8)) - 1)) == np.uint64(head)
        if len(tag) > 8:
            same &= padded[at + 8] == tag[8]
        same &= at + len(tag) <= offsets[owner + 1]  # a tag ends within its row
        kind[same] = number
    at, owner, kind = at[kind > 0], owner[kind > 0], kind[kind > 0]
    counts = np.bincount(owner, minlength=rows)
    first = np.cumsum(counts) - counts
    rank = np.arange(len(at)) - first[owner]
    digits = np.where(rank < 4, kind * 5 ** np.minimum(rank, 3), 0)
    order = np.bincount(owner, weights=digits, minlength=rows).astype(np.int64)
    wanted = [sum(tag * 5**rank for rank, tag in enumerate(tags)) for tags in _ORDERS]
    plain = np.isin(order, wanted) & (counts <= 4)
    starts, ends = np.full(rows, -1, np.int64), np.full(rows, -1, np.int64)
    last = (first + counts - 1)[plain]
    starts[plain] = at[last - 1] + len(TAGS[_ANSWER - 1])
    ends[plain] = at[last]
    return starts, ends


def _slices(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> pa.StringArray:
    """The strings `data[starts[i]:ends[i]]`."""
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    picked = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return pa.StringArray.from_buffers(
        len(starts), pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data[picked])
    )


def _stripped(text: str) -> tuple[str | None, str]:
    text = text.strip()
    return (text, "") if text else (None, "empty_answer")


def _code(known: dict[tuple[str | None, str], int], text: str | None, problem: str) -> int:
    return known.setdefault((text, problem), len(known))
