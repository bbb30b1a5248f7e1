"""Engines at work: what they refuse is named, those that die are replaced, nothing is lost."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tasks.engines import refusals, sampler
from tasks.engines.base import Sampling
from tasks.engines.ray_pool import RayWorker
from tasks.engines.refusals import REFUSED
from tasks.engines.worker import BusyClock, Query, Shard
from tasks.evaluate import evaluate
from tasks.propose import propose
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.split_table import select
from tests.conftest import ENGINE, evaluate_arguments, propose_arguments, run_stage
from tests.fakes import AILS


@pytest.fixture
def ill(split_set, monkeypatch):
    """Run Propose with an engine that ails; returns rollouts, what the engine noted, the stats."""

    def run(backend: str = "ailing", **ails):
        output, notes = split_set.root / "p", split_set.root / "notes"
        output.mkdir(exist_ok=True)
        notes.mkdir(exist_ok=True)
        changed = {
            k: ails.pop(k)
            for k in ("max_lost_share", "limit", "fail_fast_unparsed_share")
            if k in ails
        }
        processes = ails.pop("processes", 1)
        backend = f"tests.fakes:{backend}"
        engine = replace(ENGINE, backend=backend, max_num_seqs=64, processes=processes)
        monkeypatch.setenv(AILS, json.dumps({"notes": str(notes), **ails}))
        run_stage(propose, output, **propose_arguments(split_set, engine=engine, **changed))
        noted = {path.name: path.read_text().splitlines() for path in notes.iterdir()}
        stats = json.loads((output / "stats.json").read_text())
        return shards.read(output, "rollouts").to_pylist(), noted, stats

    run.set = split_set
    return run


def every_image_once(rows: list[dict], made) -> bool:
    wanted = {row["image_id"] for row in select(made.split, "train", ("base",))}
    counts = Counter(row["image_id"] for row in rows)
    distinct = {(row["image_id"], row["rollout"]) for row in rows}
    return set(counts) == wanted and set(counts.values()) == {20} and len(distinct) == len(rows)


@pytest.fixture
def healthy(ill) -> list[dict]:
    """The rollouts of an engine that does not ail."""
    rows, _, _ = ill()
    for path in (ill.set.root / "p").iterdir():
        path.unlink()
    for path in (ill.set.root / "notes").iterdir():
        path.unlink()
    return rows


def test_an_image_that_the_engine_refuses_is_found_by_halving_and_the_rest_goes_on(ill, healthy):
    rows, noted, stats = ill(refuse="crimson gold-belt/0001", max_lost_share=0.1)
    assert every_image_once(rows, ill.set)
    bad = [row for row in rows if row["finish_reason"] == REFUSED]
    assert {row["image_id"] for row in bad} == {"few/train/crimson gold-belt/0001.png"}
    assert {(row["completion"], row["num_tokens"]) for row in bad} == {("", 0)}
    shard = range(16 * 20, 32 * 20)  # rows of the second shard, whose halves draw anew
    assert all(rows.index(row) in shard for row in bad)
    assert (
        rows[: shard.start] + rows[shard.stop :] == healthy[: shard.start] + healthy[shard.stop :]
    )
    assert [row["finish_reason"] for row in rows].count(REFUSED) == 20
    reasons = shards.read(ill.set.root / "p", "rollouts_refused").to_pylist()
    assert reasons == [{"image_id": bad[0]["image_id"], "reason": "cannot look at this"}]
    assert stats["refused"] == 1
    assert stats["finish_reasons"][REFUSED] == 20
    assert len(noted["asked"]) == 4 + 2 * 4, "four shards, and four halvings of one of sixteen"
    assert not list((ill.set.root / "p").glob("refused-*"))


def test_the_reasons_of_an_earlier_attempt_are_not_kept(ill):
    (ill.set.root / "p").mkdir()
    old = ill.set.root / "p" / "refused-rollouts-00000.parquet"
    shards.write(old, [{"image_id": "x", "reason": "y"}], schemas.refused())
    _, _, stats = ill()
    assert stats["refused"] == 0
    assert not list((ill.set.root / "p").glob("*refused*"))


def test_reasons_gathered_by_a_run_that_was_cut_off_are_kept(tmp_path):
    shard = Shard(1, tmp_path / "rollouts-00001.parquet", tmp_path, (), Sampling(1, 0, 1, 1, 9, 0))
    first, second = ([{"image_id": i, "reason": "y"}] for i in ("a", "b"))
    shards.write(tmp_path / "rollouts_refused.parquet", first, schemas.refused())
    shards.write(refusals.of_shard(shard.path), second, schemas.refused())
    refusals.gather(tmp_path, "rollouts", [shard.path])
    gathered = shards.read_file(tmp_path / "rollouts_refused.parquet").to_pylist()
    assert gathered == first + second
    assert not refusals.of_shard(shard.path).exists()


def test_a_full_disk_is_not_taken_for_a_dying_engine(ill, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(
        StageError, match=r"rollouts-0000\d.parquet cannot be written: No space left"
    ):
        ill()


def test_more_refused_images_than_allowed_fail_the_stage_naming_them(ill):
    with pytest.raises(
        StageError, match=r"refused 4 of 60 images .*max_lost_share.*0\.png: cannot"
    ):
        ill(refuse="gold-belt/0000", max_lost_share=0.05)


def test_an_engine_that_refuses_everything_is_at_fault_itself(ill):
    with pytest.raises(StageError, match="the engine refuses every image of shard 0: cannot look"):
        ill(refuse="few/", max_lost_share=1.0)


def test_the_longest_prompt_with_the_largest_image_is_checked_before_the_first_shard(ill):
    with pytest.raises(StageError, match="the longest prompt has 999 tokens"):
        ill(**{"too long": True})
    assert not list((ill.set.root / "p").glob("rollouts-*"))
    _, noted, _ = ill()
    assert len(noted["checked"]) == 2


@pytest.mark.process
@pytest.mark.parametrize("give_up", [False, True])
def test_an_engine_that_dies_is_replaced_and_its_shard_done_again(ill, healthy, give_up, capfd):
    rows, noted, _ = ill("isolated", kill="emerald gold-belt/0001", deaths=1, give_up=give_up)
    assert rows == healthy
    assert len(noted["opened"]) == 2
    assert len({line.split()[0] for line in noted["opened"]}) == 2, "a fresh process"
    asked = Counter(key for line in noted["asked"] for key in line.split(" ", 1)[1].split(" few/"))
    assert max(asked.values()) <= 2, "one shard was done again, no other"
    told = "it gave up" if give_up else "killed by SIGKILL"
    assert f"the engine ended ({told}" in capfd.readouterr().err


@pytest.mark.process
def test_an_engine_that_dies_again_gets_half_the_batch_and_half_the_sequences(ill, healthy):
    rows, noted, _ = ill("isolated", batch=8, deaths=0, limit=20)
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in healthy[: 20 * 20]]
    assert rows[: 8 * 20] == healthy[: 8 * 20], "the first half draws as the whole would have"
    assert [line.split()[1] for line in noted["opened"]] == ["64", "64", "32"]
    assert len(noted["died"]) == 2


@pytest.mark.process
def test_an_engine_that_dies_three_times_on_a_shard_is_reported_with_its_images(ill):
    with pytest.raises(StageError, match=r"died 3 times on shard \d .*SIGKILL.*max_num_seqs.*few/"):
        ill("isolated", kill="emerald gold-belt/0001", deaths=99)
    finished = list((ill.set.root / "p").glob("rollouts-*"))
    rows, _, _ = ill("isolated", kill="emerald gold-belt/0001", deaths=0)
    assert every_image_once(rows, ill.set), "and what was finished is kept"
    assert len(finished) < 4


@pytest.mark.process
def test_two_processes_share_the_shards_and_do_none_twice(ill, healthy):
    rows, noted, stats = ill("isolated", processes=2, slots=2, pause=1.5)
    assert rows == healthy
    assert len({line.split()[0] for line in noted["asked"]}) == 2
    keys = [line.split(" ", 1)[1] for line in noted["asked"]]
    assert len(keys) == len(set(keys)) == 4
    assert stats["engines"] == 2
    assert stats["rollouts_per_second"] == pytest.approx(1200 / stats["seconds"], rel=0.1)
    assert stats["prompt_tokens"] == 600
    assert stats["cached_share"] == pytest.approx(0.4)


@pytest.mark.process
def test_a_crash_at_the_start_ends_the_stage(split_set):
    (split_set.root / "p").mkdir()
    engine = replace(ENGINE, backend="tests.fakes:isolated", processes=1)  # lacks AILS
    with pytest.raises(
        StageError, match=r"the engine does not start \(exit code 1\); see its messages"
    ):
        run_stage(propose, split_set.root / "p", **propose_arguments(split_set, engine=engine))


def test_a_bad_prompt_is_noticed_after_two_shards(ill):
    with pytest.raises(
        StageError, match=r"of the first 640 answers cannot be read .*'no tags at all'"
    ):
        ill(fail_fast_unparsed_share=0.01, pause=0.2)
    assert len(list((ill.set.root / "p").glob("rollouts-*"))) < 4


def test_a_trial_takes_the_first_images_only(ill):
    rows, _, stats = ill(limit=5)
    first = [row["image_id"] for row in select(ill.set.split, "train", ("base",))][:5]
    assert sorted({row["image_id"] for row in rows}) == first
    assert stats["images"] == 5


def test_a_closed_list_may_stand_before_the_image(split_set, monkeypatch):
    seen = []
    original = sampler.Sampler.run
    monkeypatch.setattr(
        sampler.Sampler,
        "run",
        lambda self, *a, **k: (seen.append(a[2]), original(self, *a, **k))[1],
    )
    for position in ("in_question", "before_image"):
        output = split_set.root / position
        output.mkdir()
        engine = replace(ENGINE, list_position=position)
        run_stage(
            propose, output, **propose_arguments(split_set, prompt="closed_list", engine=engine)
        )
    inside, ahead = (asks[0] for asks in seen)
    assert inside.before == ""
    assert "rose gold-belt; " in inside.text
    assert ahead.before == "It is one of these: " + ahead.before.removeprefix(
        "It is one of these: "
    )
    assert "rose gold-belt; " in ahead.before
    assert "one of these" not in ahead.text
    with pytest.raises(StageError, match="list_position must be in_question or before_image"):
        run_stage(
            propose,
            split_set.root / "x",
            **propose_arguments(split_set, engine=replace(ENGINE, list_position="behind")),
        )


def test_evaluate_counts_a_refused_image_as_wrong(split_set, monkeypatch):
    output, notes = split_set.root / "e", split_set.root / "notes"
    output.mkdir()
    notes.mkdir()
    ails = {"notes": str(notes), "refuse": "crimson gold-belt/0001"}
    monkeypatch.setenv(AILS, json.dumps(ails))
    engine = replace(ENGINE, backend="tests.fakes:ailing")
    run_stage(evaluate, output, **evaluate_arguments(split_set, engine=engine))
    rows = [
        row
        for row in shards.read(output, "predictions").to_pylist()
        if "crimson gold-belt/0001" in row["image_id"]
    ]
    assert {row["mode"] for row in rows} == {"one_step", "majority", "two_step"}
    assert not any(row["correct"] for row in rows)
    assert len(shards.read(output, "predictions")) == 3 * 80
    assert (output / "rollouts_refused.parquet").exists()


def test_the_busy_clock_counts_overlapping_work_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tasks.engines.worker.time.perf_counter", lambda: now[0])
    clock = BusyClock()
    clock.__enter__()
    now[0] = 1.0
    clock.__enter__()
    now[0] = 3.0
    clock.__exit__()
    now[0] = 4.0
    assert clock.seconds == 4.0
    clock.__exit__()
    now[0] = 9.0
    assert clock.seconds == 4.0


def test_a_worker_of_ray_needs_only_the_shard_that_it_is_sent_and_answers_it_once(split_set):
    ids = [row["image_id"] for row in select(split_set.split, "train", ("base",))]
    sampling = sampler.sampling_of(ENGINE, 2, seed=0, shard=0)
    first, second = (
        Shard(
            number,
            shards.shard_path(split_set.root, "rollouts", number),
            split_set.download,
            tuple(Query(image_id, "What is it?") for image_id in part),
            sampling,
        )
        for number, part in enumerate((ids[:3], ids[3:8]))
    )
    worker = RayWorker(split_set.root, ENGINE, first)
    for shard in (second, first, second):
        row = worker({"shard": [shard]})
        assert (row["shard"], row["images"]) == ([shard.number], [len(shard.queries)])
        assert row["error"] == [""]
    assert row["busy"] == [0.0], "it was on disk"
    answered = shards.read(split_set.root, "rollouts", ["image_id"])["image_id"].to_pylist()
    assert answered == [image_id for image_id in ids[:8] for _ in range(2)]
