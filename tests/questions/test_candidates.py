"""Candidates: rollouts in any order, in any shards, with anything written in them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.language.class_names import ClassNames
from tasks.language.vocabulary import Vocabulary
from tasks.questions.candidates import merge, merge_all, merge_images
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards

SETTLED = settings(deadline=None, derandomize=True, database=None)
NAMES = ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross", "Crow", "Gull")
BIRDS = ClassNames(NAMES, {"Crow": ("American Crow",)})
ALL = set(range(5))
SAID = ["Crow", "crow.", "American Crow", "GULL", "Laysan albatross", "Finch", "finches", "a Finch"]


def said(*texts: str) -> list[tuple[str, float]]:
    return [(f"<think>x</think><answer>{text}</answer>", -1.0) for text in texts]


def write(folder: Path, rows: list[tuple[str, int, str, float]], size: int) -> Path:
    folder.mkdir()
    for index, part in enumerate(shards.chunks(rows, size)):
        keys = ("image_id", "rollout", "completion", "mean_logprob")
        told = [
            dict(zip(keys, row, strict=True)) | {"finish_reason": "stop", "num_tokens": 1}
            for row in part
        ]
        shards.write(shards.shard_path(folder, "rollouts", index), told, schemas.rollouts())
    return folder


@settings(SETTLED, max_examples=30)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "d", "e"]),
            st.sampled_from([f"<answer>{text}</answer>" for text in SAID] + ["no tags", ""]),
            st.floats(-9, 0, width=32),
        ),
        min_size=1,
        max_size=40,
    ),
    rng=st.randoms(use_true_random=False),
    size=st.integers(1, 9),
    block=st.integers(1, 3),
)
def test_the_order_of_rows_within_a_block_and_of_files_changes_nothing(
    tmp_path_factory, rows, rng, size, block
):
    numbered = [(image, n, text, value) for n, (image, text, value) in enumerate(rows)]
    root = tmp_path_factory.mktemp("order")
    ids = ["a", "b", "c", "d", "e"]
    vocabulary = Vocabulary(BIRDS, frozenset({0, 3, 4}), open=True)
    # Any order within a block is read; any order at all is read alike or refused.
    rank = {row: rng.random() for row in numbered}
    within = sorted(numbered, key=lambda row: (ids.index(row[0]) // block, rank[row]))
    found = {}
    for name, order in (("sorted", sorted(numbered)), ("within", within)):
        blocks = merge_images(write(root / name, order, size), ids, vocabulary, block)
        found[name] = [votes for merged in blocks for votes in merged.images()]
    shuffled = write(root / "shuffled", sorted(numbered, key=lambda row: rank[row]), size)
    try:
        blocks = list(merge_images(shuffled, ids, vocabulary, block))
        found["shuffled"] = [votes for merged in blocks for votes in merged.images()]
    except StageError as error:
        assert "not in the order of the split" in str(error)  # noqa: PT017
    assert all(each == found["sorted"] for each in found.values())
    assert len(found["sorted"]) == len(ids), "an image without rollouts has its row as well"
    assert [votes.num_rollouts for votes in found["sorted"]] == [
        sum(image == i for image, *_ in numbered) for i in ids
    ]


def test_shards_in_the_order_of_the_split_are_read_and_others_refused_in_a_sentence(tmp_path):
    rows = [(image, n, "<answer>Crow</answer>", -1.0) for image in "abcdef" for n in range(4)]
    vocabulary = Vocabulary(BIRDS, frozenset(ALL))
    ids = list("abcdef")
    for size in (4, 5, 24):
        folder = write(tmp_path / f"sorted{size}", rows, size)
        assert len(list(merge_images(folder, ids, vocabulary, 2))) == 3
    turned = write(tmp_path / "turned", rows[12:] + rows[:12], 12)
    assert len(list(merge_images(turned, ids, vocabulary, 2))) == 3, "files have any numbers"
    by_rollout = sorted(rows, key=lambda row: row[1])
    for size, told in ((24, "within rollouts-00000"), (6, "between rollouts-0000")):
        folder = write(tmp_path / f"mixed{size}", by_rollout, size)
        with pytest.raises(StageError, match=f"not in the order of the split, {told}") as caught:
            list(merge_images(folder, ids, vocabulary, 2))
        assert "re-run Propose" in str(caught.value)


def test_a_rollout_that_is_there_twice_is_refused_wherever_it_lies(tmp_path):
    rows = [("a", 0, "x", -1.0), ("b", 0, "x", -1.0), ("a", 0, "y", -1.0)]
    with pytest.raises(StageError, match="holds rollouts of a twice"):
        merge_all(write(tmp_path / "twice", rows, 1), BIRDS, ALL)


def test_rollouts_of_unknown_images_are_left_out(tmp_path):
    rows = [(image, 0, "<answer>Crow</answer>", -1.0) for image in ("a", "b", "zzz")]
    (merged,) = merge_images(
        write(tmp_path / "r", rows, 1), ["b"], Vocabulary(BIRDS, frozenset(ALL)), 5
    )
    assert merged.counts.tolist() == [[1, 0, 0]]


def test_every_distinct_answer_is_told_with_the_step_that_read_it():
    votes = merge([*said("Crow", "crow", "crow", "Gulls", "Dodo"), ("no tags", -1.0)], BIRDS, {3})
    assert [tuple(answer) for answer in votes.answers] == [
        ("crow", 2, 3, "exact"),
        ("", 1, -1, "no_answer"),
        ("Crow", 1, 3, "exact"),
        ("Dodo", 1, -1, "none"),
        ("Gulls", 1, 4, "plural"),
    ]
    assert (votes.num_rollouts, votes.num_unparsed, votes.num_outside) == (6, 1, 2)


def test_each_distinct_answer_is_matched_once(monkeypatch):
    seen = []
    names = ClassNames(NAMES)
    match = names._match
    monkeypatch.setattr(names, "_match", lambda text: seen.append(text) or match(text))
    merge(said(*["Crow", "Gull"] * 500), names, ALL)
    assert sorted(seen) == ["Crow", "Gull"]


def open_merge(*texts: str, allowed=frozenset({0, 3})) -> list[tuple]:
    import tempfile

    from tests.conftest import write_rollouts

    with tempfile.TemporaryDirectory() as folder:
        write_rollouts(Path(folder), {"x": list(texts)})
        (merged,) = merge_images(Path(folder), ["x"], Vocabulary(BIRDS, allowed, open=True), 1)
        return [(c.class_id, c.name, c.votes) for c in next(merged.images()).candidates]


def test_open_names_are_candidates_under_their_most_frequent_spelling():
    found = open_merge("Finch", "finches", "finches", "the finch", "Crow", "crow")
    assert found == [(-1, "finches", 4), (3, "", 2)]


def test_a_novel_class_is_never_an_open_candidate_in_whatever_spelling():
    novel = ("Gull", "gulls", "the Gull.", "a young Gull", "Sooty Albatross", "Albatross")
    assert open_merge(*novel, "Crow", "or", "Gull or Finch") == [(3, "", 1)]


@SETTLED
@given(st.lists(st.sampled_from(SAID), min_size=1, max_size=12), st.data())
def test_votes_add_up_and_ranks_fall(texts, data):
    values = data.draw(st.lists(st.floats(-50, 0), min_size=len(texts), max_size=len(texts)))
    pairs = [(pair[0], value) for pair, value in zip(said(*texts), values, strict=True)]
    votes = merge(pairs, BIRDS, {0, 3, 4})
    total = sum(c.votes for c in votes.candidates)
    assert total + votes.num_unparsed + votes.num_outside == len(texts)
    assert sum(answer.votes for answer in votes.answers) == len(texts)
    for a, b in itertools.pairwise(votes.candidates):
        assert (-a.votes, -a.logprob, a.class_id) <= (-b.votes, -b.logprob, b.class_id)
    for c in votes.candidates:
        own = [
            v for t, v in zip(texts, values, strict=True) if BIRDS.match(t).class_id == c.class_id
        ]
        assert c.logprob == pytest.approx(np.mean(own), abs=1e-9)


def test_a_missing_log_probability_is_no_error():
    votes = merge(
        [("<answer>Crow</answer>", None), ("<answer>Gull</answer>", float("nan"))], BIRDS, ALL
    )
    assert [c.class_id for c in votes.candidates] == [3, 4]
