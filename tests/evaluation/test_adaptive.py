"""The mode adaptive: when sampling stops, what is asked, how thresholds are set, and who counts."""

import json
from dataclasses import replace

import pytest

from tasks.engines.base import Completion, Request, Sampling
from tasks.engines.refusals import REFUSED, generate_in_instalments
from tasks.evaluate import evaluate
from tasks.evaluation import adaptive
from tasks.evaluation.adaptive import NEVER, Decision, Thresholds, decide
from tasks.evaluation.tuning import choose
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge_all
from tasks.questions.votes import Candidate, Votes
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import evaluate_arguments, run_stage
from tests.fakes import FakeEngine


def votes(*counts: int, unread: int = 0) -> Votes:
    candidates = [Candidate(number, count, -1.0) for number, count in enumerate(counts)]
    return Votes(candidates, sum(counts) + unread, unread, 0, [])


@pytest.mark.parametrize(
    ("counts", "left", "stop", "settled"),
    [
        ((4,), 16, 1.0, True),  # all four agree
        ((3, 1), 16, 1.0, False),
        ((3, 1), 16, 0.5, True),
        ((11, 1), 8, NEVER, True),  # nobody can catch up
        ((10, 2), 8, NEVER, False),  # the second could draw level
        ((), 4, 0.0, False),  # no lead without a vote
        ((2, 2), 4, 0.0, False),
    ],
)
def test_sampling_stops_when_the_leader_is_settled(counts, left, stop, settled):
    assert adaptive.is_settled(votes(*counts), left, Thresholds(stop=stop)) == settled


def test_an_unread_sample_is_no_agreement():
    assert not adaptive.is_settled(votes(3, unread=1), 16, Thresholds())


@pytest.mark.parametrize(
    ("counts", "options"),
    [((4,), 1), ((3, 1), 1), ((9, 8, 1), 2), ((6, 5, 4, 3), 5)],
)
def test_the_question_has_as_many_options_as_the_votes_leave_open(counts, options):
    thresholds = Thresholds(stop=NEVER, agree=0.5, pair=0.9)
    assert adaptive.num_options(votes(*counts), 5, thresholds) == options


def test_an_image_is_answered_at_the_first_instalment_that_settles_it():
    by_count = {4: votes(3, 1), 8: votes(7, 1), 20: votes(10, 10)}
    assert decide(by_count, 4, Thresholds(stop=0.75, agree=0.75)) == Decision(8, 1)
    assert decide(by_count, 4, Thresholds(stop=0.5, agree=0.75)) == Decision(4, 4)
    assert decide(by_count, 4, Thresholds(stop=NEVER, pair=1.0)) == Decision(20, 2)


def test_the_cheapest_thresholds_within_a_point_are_chosen():
    """100 images: half agree rightly at four samples, half are split and need all and the question."""
    images = [f"i{n}" for n in range(100)]
    easy = set(images[:50])
    by_count = {
        4: {i: votes(4) if i in easy else votes(2, 2) for i in images},
        20: {i: votes(20) if i in easy else votes(8, 7, 5) for i in images},
    }
    right = {(n, k): dict.fromkeys(images, True) for n in (4, 20) for k in (1, 2, 4)}
    for key in ((4, 1), (4, 2), (4, 4), (20, 1), (20, 2)):
        right[key] = {i: i in easy for i in images}
    thresholds, figures = choose(by_count, right, 4)
    assert figures["two_step"] == {"accuracy": 1.0, "answers": 20.5}, "one candidate is not asked"
    assert (figures["accuracy"], figures["answers"]) == (1.0, (50 * 4 + 50 * 21) / 100)
    assert thresholds.pair > 0.75, "two options would lose the truth"
    # Where the early votes are wrong beyond a point, all samples are taken.
    for image in images[:3]:
        right[4, 1][image] = right[4, 2][image] = right[4, 4][image] = False
    _, figures = choose(by_count, right, 4)
    assert figures["answers"] == 20.5
    assert figures["met"]


class Numbered:
    """Says which sample of which call an answer is; refuses images named so."""

    def __init__(self):
        self.calls: list[tuple[int, list[str], int]] = []
        self.refused: list[int] = []

    def generate(self, requests, sampling):
        if [request.key for request in requests] == ["refused"]:
            self.refused.append(sampling.n)
        if any(request.key == "refused" for request in requests):
            raise ValueError("no")
        self.calls.append((sampling.n, [r.key for r in requests], sampling.seed))
        return [
            [Completion(f"{len(self.calls)}.{i}", "stop", 1, -1.0) for i in range(sampling.n)]
            for _ in requests
        ]


class AfterFour:
    counts = (4, 8)

    def __call__(self, key, completions):
        return key == "easy" and len(completions) == 4


def test_an_image_that_has_enough_is_not_asked_again():
    engine, refused = Numbered(), {}
    requests = [Request(key, b"", "?") for key in ("easy", "refused", "hard")]
    sampling = Sampling(20, 1.0, 1.0, 1.0, 9, seed=3)
    answers = generate_in_instalments(engine, requests, sampling, refused, AfterFour())
    assert [len(row) for row in answers] == [4, 20, 20]
    assert {each.finish_reason for each in answers[1]} == {REFUSED}
    assert refused == {"refused": "no"}
    assert engine.refused == [4], "it is not sent again"
    assert [call[0] for call in engine.calls[-2:]] == [4, 12], "of the hard image alone"
    seeds = [seed for _, keys, seed in engine.calls if keys == ["hard"]]
    assert len(set(seeds)) == len(seeds), "no instalment repeats the samples of another"


def test_without_a_rule_it_is_one_call():
    engine = Numbered()
    sampling = Sampling(20, 1.0, 1.0, 1.0, 9, seed=3)
    generate_in_instalments(engine, [Request("a", b"", "?")], sampling, {})
    assert engine.calls == [(20, ["a"], 3)]


@pytest.fixture
def adapted(split_set):
    """The mode adaptive alone, and beside modes that need all samples."""
    for name, modes in (("alone", "adaptive"), ("beside", "majority two_step adaptive")):
        folder = split_set.root / name
        folder.mkdir()
        arguments = evaluate_arguments(split_set, modes=modes, instalments="4 8")
        run_stage(evaluate, folder, **arguments)
    return split_set


def rows_of(folder):
    predictions = shards.read(folder, "predictions").to_pylist()
    rows = {row["image_id"]: row for row in predictions if row["mode"] == "adaptive"}
    return rows, {
        row["image_id"]: row for row in shards.read(folder, "adaptive_counts").to_pylist()
    }


def test_every_image_is_answered_from_no_more_samples_than_it_needs(adapted):
    names = ClassNames(adapted.card.classes, adapted.card.aliases)
    for name in ("alone", "beside"):
        folder = adapted.root / name
        rows, used = rows_of(folder)
        thresholds = Thresholds(**adaptive.load(folder)["thresholds"])
        by_count = {c: merge_all(folder, names, set(range(40)), c) for c in (4, 8, 20)}
        for key, row in rows.items():
            decision = decide({c: v[key] for c, v in by_count.items()}, 4, thresholds)
            own = by_count[decision.num_rollouts][key]
            assert used[key]["num_rollouts"] == decision.num_rollouts
            top = [adapted.card.classes[c.class_id] for c in own.candidates]
            assert sorted(row["options"]) == sorted(top[: decision.num_options])
            if decision.num_options == 1:
                assert row["class_id"] == own.candidates[0].class_id
                assert row["status"].endswith("votes")
    assert {d["num_rollouts"] for d in used.values()} > {4}, "some stopped early, some did not"


def test_alone_it_samples_in_instalments(adapted):
    _, used = rows_of(adapted.root / "alone")
    stored = shards.read(adapted.root / "alone", "rollouts", ["image_id"])["image_id"].to_pylist()
    assert {key: row["num_rollouts"] for key, row in used.items()} == {
        key: stored.count(key) for key in used
    }
    assert not (adapted.root / "alone" / "pass_at_k.json").exists()
    assert len(stored) < 20 * len(used)


def test_a_run_that_goes_on_finds_its_own_answers(adapted, monkeypatch):
    folder = adapted.root / "alone"
    before = shards.read(folder, "predictions").to_pylist()
    (folder / "predictions.parquet").unlink()
    monkeypatch.setattr(FakeEngine, "generate", lambda *_: pytest.fail("asked again"))
    arguments = evaluate_arguments(adapted, modes="adaptive", instalments="4 8")
    run_stage(evaluate, folder, **arguments)
    assert shards.read(folder, "predictions").to_pylist() == before


def test_thresholds_are_set_on_val_images_of_base_classes_alone(adapted):
    split = shards.read(adapted.split, "split").to_pylist()
    val = {row["image_id"] for row in split if (row["split"], row["group"]) == ("val", "base")}
    folder = adapted.root / "alone"
    for path in folder.glob("val_*.parquet"):
        assert set(shards.read_file(path, ["image_id"])["image_id"].to_pylist()) <= val
    contents = json.loads((folder / "thresholds.json").read_text())
    assert contents["val"]["images"] == len(val)
    assert contents["asked"]["instalments"] == "4 8"
    assert contents == json.loads((adapted.root / "beside" / "thresholds.json").read_text())


def test_without_val_images_it_says_so(split_set, monkeypatch):
    monkeypatch.setattr(FakeEngine, "generate", lambda *_: pytest.fail("too late"))
    rows = shards.read(split_set.split, "split")
    kept = rows.filter([part != "val" for part in rows["split"].to_pylist()])
    for path in split_set.split.glob("split*.parquet"):
        path.chmod(0o644)
        path.unlink()
    shards.write(split_set.split / "split.parquet", kept.to_pylist(), kept.schema)
    folder = split_set.root / "evaluate"
    folder.mkdir()
    with pytest.raises(StageError, match="sets its thresholds on them"):
        run_stage(evaluate, folder, **evaluate_arguments(split_set, modes="adaptive"))


def test_thresholds_for_other_numbers_are_refused(adapted):
    from tasks.evaluation.settings import PredictSettings

    folder = str(adapted.root / "alone")
    settings = PredictSettings(mode="adaptive", thresholds=folder, num_options=4)
    assert adaptive.of_prediction(settings).counts == (4, 8)
    with pytest.raises(StageError, match="set with num_rollouts = 20; this prediction has 8"):
        adaptive.of_prediction(replace(settings, num_rollouts=8))
    with pytest.raises(StageError, match="holds no thresholds"):
        adaptive.of_prediction(replace(settings, thresholds="/nowhere"))
    with pytest.raises(StageError, match="needs thresholds"):
        PredictSettings(mode="adaptive")
