"""BuildMCQ: every rule of candidate merging and question building, as a property or an example."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.build_mcq import build_mcq
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.questions.candidates import merge
from tasks.questions.options import balanced_letters, choose_options, mcq_id, shuffle_options
from tasks.questions.votes import Candidate
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.seeding import row_generator
from tests.conftest import mcq_arguments, run_stage, write_rollouts

BIRDS = ClassNames(
    ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross", "Crow", "Gull"], {}
)


def said(*answers: str) -> list[tuple[str, float]]:
    return [(f"<think>x</think><answer>{answer}</answer>", -1.0) for answer in answers]


def test_spelling_variants_are_one_candidate_with_all_their_votes():
    votes = merge(
        said("black-footed albatross", "Black Footed Albatross", "Black_footed Albatross.", "Crow"),
        BIRDS,
        {0, 1, 2, 3, 4},
    )
    assert [(c.class_id, c.votes) for c in votes.candidates] == [(0, 3), (3, 1)]


def test_names_outside_the_vocabulary_go_before_the_cut_so_rank_six_still_counts():
    outside = [f"unheard-of bird {i}" for i in range(5)]
    votes = merge(said(*(outside * 2), "Crow"), BIRDS, {0, 3})
    assert [c.class_id for c in votes.candidates] == [3]
    assert votes.num_outside == 10


def test_unreadable_answers_are_counted_and_never_become_candidates():
    votes = merge([("no tags", -1.0), *said("Crow", "Gull")], BIRDS, {3, 4})
    assert (votes.num_rollouts, votes.num_unparsed) == (3, 1)
    assert len(votes.candidates) == 2


def test_ties_break_by_log_probability_then_class_id():
    pairs = [
        (text, value) for (text, _), value in zip(said("Gull", "Crow"), (-0.1, -2.0), strict=True)
    ]
    assert [c.class_id for c in merge(pairs, BIRDS, {3, 4}).candidates] == [4, 3]
    assert [c.class_id for c in merge(said("Gull", "Crow"), BIRDS, {3, 4}).candidates] == [3, 4]


@settings(deadline=None)  # the first example compiles and fills caches
@given(st.permutations(["Crow", "Gull", "crow.", "Laysan albatross", "GULL", "nothing", ""]))
def test_the_order_of_rollouts_never_matters(order):
    assert merge(said(*order), BIRDS, {1, 3, 4}) == merge(said(*sorted(order)), BIRDS, {1, 3, 4})


def choose(candidates, truth, **changed):
    given = {
        "num_options": 5,
        "min_options": 3,
        "top_up": "confusion",
        "confusion": [c for c in range(10) if c != truth],
        "generator": np.random.default_rng(0),
    } | changed
    return choose_options(candidates, truth, **given)


def candidates(*votes: tuple[int, int]) -> list[Candidate]:
    return [Candidate(class_id, count, -1.0) for class_id, count in votes]


def test_an_absent_truth_replaces_the_candidate_with_the_fewest_votes():
    options, outcome = choose(candidates((1, 9), (2, 5), (3, 3), (4, 2), (5, 1)), truth=7)
    assert outcome == "kept"
    assert [(o.class_id, o.source) for o in options] == [
        (1, "policy"),
        (2, "policy"),
        (3, "policy"),
        (4, "policy"),
        (7, "truth"),
    ]


def test_with_room_the_truth_is_added_and_nothing_is_lost():
    options, _ = choose(candidates((1, 9), (2, 5)), truth=7)
    assert [o.class_id for o in options] == [1, 2, 7]


def test_a_truth_below_the_cut_keeps_its_votes():
    options, _ = choose(candidates((1, 9), (2, 5), (3, 3), (4, 2), (5, 1), (7, 1)), truth=7)
    assert (options[-1].class_id, options[-1].votes, options[-1].source) == (7, 1, "truth")


def test_the_truth_alone_is_skipped_and_said_so():
    assert choose(candidates((7, 20)), truth=7) == ([], "truth_only")


def test_no_candidate_is_a_loss_and_never_a_random_question():
    assert choose([], truth=7) == ([], "no_candidates")


def test_top_up_takes_what_the_policy_confuses_most_without_repeating_an_option():
    options, _ = choose(candidates((8, 20)), truth=7, min_options=4, confusion=[8, 3, 1, 2])
    assert [o.class_id for o in options] == [8, 7, 3, 1]
    assert [o.source for o in options] == ["policy", "truth", "top_up", "top_up"]


@given(
    st.dictionaries(st.integers(0, 9), st.integers(1, 20), min_size=0, max_size=10),
    st.integers(0, 9),
    st.integers(2, 8),
    st.sampled_from(["confusion", "random", "none"]),
    st.integers(0, 99),
)
def test_any_votes_give_one_truth_and_distinct_options(votes, truth, num_options, top_up, seed):
    ranked = candidates(*sorted(votes.items(), key=lambda item: -item[1]))
    options, outcome = choose(
        ranked,
        truth,
        num_options=num_options,
        min_options=min(3, num_options),
        top_up=top_up,
        generator=np.random.default_rng(seed),
    )
    ids = [o.class_id for o in options]
    if outcome == "kept":
        assert 2 <= len(ids) <= num_options
        assert ids.count(truth) == 1
        assert len(set(ids)) == len(ids)
        assert sum(o.source == "truth" for o in options) <= 1
    else:
        assert outcome in ("truth_only", "no_candidates", "too_few_options")


@given(st.lists(st.integers(2, 6), min_size=1, max_size=200), st.integers(0, 999))
def test_letters_are_balanced_within_one_per_option_count(counts, seed):
    positions = balanced_letters(counts, np.random.default_rng(seed))
    for n in set(counts):
        used = Counter(p for p, count in zip(positions, counts, strict=True) if count == n)
        assert set(used) <= set(range(n))
        tally = [used[p] for p in range(n)]
        assert max(tally) - min(tally) <= 1


def test_no_letter_gets_the_odd_question_by_design():
    firsts = Counter(balanced_letters([5], np.random.default_rng(seed))[0] for seed in range(500))
    assert min(firsts[p] for p in range(5)) > 60


@given(st.permutations(range(5)))
def test_a_question_is_named_by_its_set_of_options(order):
    assert mcq_id("cars_train/00001.jpg", order) == mcq_id("cars_train/00001.jpg", range(5))
    assert mcq_id("cars_train/00001.jpg", order) != mcq_id("cars_test/00001.jpg", range(5))


def test_shuffling_puts_the_truth_where_it_belongs():
    options, _ = choose(candidates((1, 9), (2, 5), (7, 3)), truth=7)
    for at in range(3):
        placed = shuffle_options(options, row_generator(0, "x"), at, 7)
        assert placed[at].class_id == 7
        assert sorted(o.class_id for o in placed) == [1, 2, 7]


# The stage itself, on fake rollouts.


def test_every_question_holds_its_promises(rollouts):
    out = rollouts.root / "mcq"
    out.mkdir()
    run_stage(build_mcq, out, **mcq_arguments(rollouts))
    base = set(range(20))
    for path in shards.paths(out, "mcq"):
        rows = shards.read_file(path).to_pylist()
        by_size: dict[int, Counter] = {}
        for row in rows:
            ids = row["option_class_ids"]
            assert len(set(ids)) == len(ids) == len(row["options"]) == len(row["option_votes"])
            assert set(ids) <= base, "a novel class was offered in training"
            truth = row["options"][LETTERS.index(row["answer_letter"])]
            assert truth == row["image_id"].split("/")[2]
            assert row["options"].count(truth) == 1
            assert row["truth_injected"] == ("truth" in row["option_sources"])
            assert all(
                f"{x}. {o}" in row["question"]
                for x, o in zip(LETTERS, row["options"], strict=False)
            )
            by_size.setdefault(len(ids), Counter())[row["answer_letter"]] += 1
        for size, used in by_size.items():
            tally = [used[letter] for letter in LETTERS[:size]]
            assert max(tally) - min(tally) <= 1
    told = shards.read(out, "candidates").to_pylist()
    assert len(told) == 60, "every train image has its row, skipped ones too"
    assert all(sum(row["votes"]) + row["num_unparsed"] + row["num_outside"] == 20 for row in told)


def test_the_same_input_gives_the_same_bytes_whatever_the_order_of_rollouts_and_their_shards(
    rollouts,
):
    outs = [rollouts.root / name for name in ("one", "two", "three")]
    run_stage(build_mcq, _made(outs[0]), **mcq_arguments(rollouts))
    paths = shards.paths(rollouts.propose, "rollouts")
    shuffled = rollouts.root / "shuffled"
    shuffled.mkdir()
    for index, path in enumerate(reversed(paths)):
        (shuffled / f"rollouts-{index:05d}.parquet").write_bytes(path.read_bytes())
    run_stage(build_mcq, _made(outs[1]), **mcq_arguments(rollouts, propose=shuffled))
    rows = shards.read(rollouts.propose, "rollouts").to_pylist()
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    mixed = _made(rollouts.root / "mixed")
    for index, part in enumerate(shards.chunks(rows, 333)):
        shards.write(shards.shard_path(mixed, "rollouts", index), part, schemas.rollouts())
    run_stage(build_mcq, _made(outs[2]), **mcq_arguments(rollouts, propose=mixed))
    first, second, third = ({p.name: p.read_bytes() for p in out.iterdir()} for out in outs)
    assert first == second == third


def test_images_without_a_readable_proposal_fail_the_stage_above_the_share(rollouts):
    names = [row["image_id"] for row in shards.read(rollouts.split, "split").to_pylist()]
    train = [n for n in names if "/train/" in n]
    write_rollouts(rollouts.root / "empty", {image_id: ["nonsense"] * 4 for image_id in train})
    with pytest.raises(StageError, match=r"60 of 60 images have no readable candidate"):
        run_stage(
            build_mcq,
            _made(rollouts.root / "out"),
            **mcq_arguments(rollouts, propose=rollouts.root / "empty"),
        )


def test_missing_and_doubled_rollouts_are_refused(rollouts):
    path = shards.paths(rollouts.propose, "rollouts")[0]
    (rollouts.propose / "rollouts-00099.parquet").write_bytes(path.read_bytes())
    with pytest.raises(StageError, match="twice"):
        run_stage(build_mcq, _made(rollouts.root / "a"), **mcq_arguments(rollouts))
    (rollouts.propose / "rollouts-00099.parquet").unlink()
    path.unlink()
    with pytest.raises(StageError, match="has no rollouts of 16 images"):
        run_stage(build_mcq, _made(rollouts.root / "b"), **mcq_arguments(rollouts))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"num_options": 1}, "num_options must be at least 2"),
        ({"num_options": 27}, "26"),
        ({"top_up": "luck"}, "luck"),
    ],
)
def test_impossible_settings_are_named(rollouts, changed, told):
    with pytest.raises(StageError, match=told):
        run_stage(build_mcq, _made(rollouts.root / "x"), **mcq_arguments(rollouts, **changed))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["Crow", "crow", "Gull", "x", ""]), min_size=1, max_size=12))
def test_votes_always_add_up(answers):
    votes = merge(said(*answers), BIRDS, {3, 4})
    counted = sum(c.votes for c in votes.candidates)
    assert counted + votes.num_unparsed + votes.num_outside == len(answers)


def test_every_pair_of_classes_stays_apart():
    for a, b in itertools.combinations(range(5), 2):
        names = ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross", "Crow", "Gull"]
        assert len(merge(said(names[a], names[b]), BIRDS, set(range(5))).candidates) == 2


def _made(folder):
    folder.mkdir()
    return folder
