"""The fast path for columns reads what the parser reads, whatever a model wrote."""

import pyarrow as pa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.language import answers
from tasks.language.answer_column import TAGS, read_answers

PIECES = [*(tag.decode() for tag in TAGS), "<", " ", "é\n", "Crow", "", " <ans", "wer>"]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text()), max_size=8).map("".join)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(TEXTS, max_size=12))
@example(["<think></think><answer>\x00</answer>", "<answer>\u00a0</answer>", "</answer"])
def test_a_column_is_read_as_the_parser_reads_each_row(rows):
    column = pa.array(["skipped", *rows], pa.string())[1:]
    read = read_answers(column)
    for row, code in zip(rows, read.codes, strict=True):
        parsed = answers.parse(row)
        assert (read.texts[code], read.problems[code]) == (parsed.answer, parsed.problem)


def test_a_missing_completion_and_wide_strings_are_read_too():
    column = pa.array([None, "<answer>Crow</answer>"], pa.large_string())
    read = read_answers(column)
    assert [read.texts[code] for code in read.codes] == [None, "Crow"]
    assert read.problems[read.codes[0]] == "no_answer"
