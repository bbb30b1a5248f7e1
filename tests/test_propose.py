"""Propose and Evaluate with an engine that needs no model: shards, resuming, counting."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tasks.build_mcq import build_mcq
from tasks.engines.base import Completion
from tasks.evaluate import evaluate
from tasks.evaluation.changes import refreshes
from tasks.evaluation.modes import vote_share
from tasks.language.class_names import ClassNames
from tasks.propose import propose
from tasks.questions.candidates import merge_all
from tasks.questions.instalments import AllNameTheTruth
from tasks.questions.settings import ProposeSettings
from tasks.runtime.errors import ShardError, StageError
from tasks.tables import shards
from tasks.tables.split_table import select
from tests.conftest import (
    ENGINE,
    ROOT,
    as_config,
    evaluate_arguments,
    mcq_arguments,
    propose_arguments,
    run_stage,
    settings_of,
)
from tests.fakes import FakeEngine


def read(folder) -> list[dict]:
    return shards.read(folder, "rollouts").to_pylist()


def test_every_base_train_image_gets_n_rollouts_and_no_other_image_any(rollouts):
    rows = read(rollouts.propose)
    counts = Counter(row["image_id"] for row in rows)
    wanted = {row["image_id"] for row in select(rollouts.split, "train", ("base",))}
    assert set(counts) == wanted
    assert set(counts.values()) == {20}
    assert len({(row["image_id"], row["rollout"]) for row in rows}) == len(rows)


def test_the_stage_tells_what_was_sampled(rollouts):
    stats = json.loads((rollouts.propose / "stats.json").read_text())
    assert stats["rollouts"] == 1200
    assert 0.4 < stats["pass_at_1"] < 0.6
    assert stats["pass_at_n"] > 0.95
    assert stats["finish_reasons"]["length"] == stats["unparsed"]


def test_a_resumed_stage_redoes_nothing_and_ends_with_the_same_bytes(rollouts):
    whole = {p.name: p.read_bytes() for p in rollouts.propose.glob("rollouts-*")}
    assert len(whole) == 4
    resumed = rollouts.root / "resumed"
    resumed.mkdir()
    kept = sorted(whole)[:2]
    for name in kept:
        (resumed / name).write_bytes(whole[name])
    before = {name: (resumed / name).stat().st_mtime_ns for name in kept}
    run_stage(propose, resumed, **propose_arguments(rollouts))
    assert {p.name: p.read_bytes() for p in resumed.glob("rollouts-*")} == whole
    assert {name: (resumed / name).stat().st_mtime_ns for name in kept} == before


def test_nothing_left_to_do_opens_no_engine(rollouts):
    broken = replace(ENGINE, backend="tests.fakes:no_such_engine")
    run_stage(propose, rollouts.propose, **propose_arguments(rollouts, engine=broken))


@pytest.mark.process
def test_killed_in_the_middle_it_goes_on_and_each_rollout_is_there_once(split_set, few_beetles):
    output = split_set.root / "killed"
    output.mkdir()
    slow = replace(ENGINE, backend="tests.fakes:slow_engine")
    own = settings_of(ProposeSettings, shard_size=6).values()
    arguments = propose_arguments(split_set, **own, engine=slow.values())
    config = as_config(split_set.root / "recipe.json", {"output": output, **arguments})
    code = (
        "import sys, data_cards; from pathlib import Path;"
        f"data_cards.FOLDER = Path({str(split_set.root / 'cards')!r});"
        "from tasks.propose import propose; from tasks.runtime.command import main; main(propose)"
    )
    command = [sys.executable, "-c", code, str(config)]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if len(list(output.glob("rollouts-*.parquet"))) >= 3:
            break
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    finished = {p.name: p.stat().st_mtime_ns for p in output.glob("rollouts-*.parquet")}
    assert 3 <= len(finished) < 10
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    after = {p.name: p.stat().st_mtime_ns for p in output.glob("rollouts-*.parquet")}
    assert len(after) == 10
    assert {name: after[name] for name in finished} == finished, "a finished shard was redone"
    assert Counter(row["image_id"] for row in read(output)) == Counter(
        {row["image_id"]: 20 for row in select(split_set.split, "train", ("base",))}
    )
    assert len({(row["image_id"], row["rollout"]) for row in read(output)}) == 1200


def test_a_prompt_that_is_not_followed_fails_the_stage_with_an_example(split_set):
    (split_set.root / "p").mkdir()
    with pytest.raises(StageError, match=r"answers cannot be read .*max_unparsed_share.*no tags"):
        run_stage(
            propose, split_set.root / "p", **propose_arguments(split_set, max_unparsed_share=0.01)
        )


def test_an_engine_that_answers_too_few_is_refused(split_set, monkeypatch):
    real = FakeEngine.generate
    monkeypatch.setattr(FakeEngine, "generate", lambda *a: real(*a)[:-1])
    (split_set.root / "p").mkdir()
    with pytest.raises(StageError, match="gave 300 answers to 16 images asked for 20 each"):
        run_stage(propose, split_set.root / "p", **propose_arguments(split_set))


def test_an_unknown_backend_is_named(split_set):
    (split_set.root / "p").mkdir()
    with pytest.raises(StageError, match=r"backend must be vllm, server, .*; got 'vlm'"):
        replace(ENGINE, backend="vlm")
    engine = replace(ENGINE, backend="tests.fakes:none")
    with pytest.raises(StageError, match=r"backend = 'tests.fakes:none' cannot be imported"):
        run_stage(propose, split_set.root / "p", **propose_arguments(split_set, engine=engine))


def test_damaged_images_are_found_when_read(split_set):
    path = shards.paths(split_set.download, "images")[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (split_set.root / "p").mkdir()
    with pytest.raises(ShardError, match=r"images-00000.parquet is damaged"):
        run_stage(propose, split_set.root / "p", **propose_arguments(split_set))


@pytest.fixture
def evaluated(split_set):
    output = split_set.root / "evaluate"
    output.mkdir()
    run_stage(evaluate, output, **evaluate_arguments(split_set))
    split_set.evaluate = output
    return split_set


def test_every_test_image_counts_in_every_mode(evaluated):
    rows = shards.read(evaluated.evaluate, "predictions").to_pylist()
    wanted = {row["image_id"] for row in select(evaluated.split, "test", ("base", "novel"))}
    for mode in ("one_step", "majority", "two_step"):
        assert {row["image_id"] for row in rows if row["mode"] == mode} == wanted
    assert len(rows) == 3 * len(wanted)
    assert all(row["correct"] == (row["class_id"] == row["label"]) for row in rows)
    failed = [row for row in rows if row["class_id"] == -1]
    assert failed
    assert all(row["status"] and not row["correct"] for row in failed)


def test_two_step_asks_about_the_merged_candidates_without_the_truth_injected(evaluated):
    names = ClassNames(evaluated.card.classes, evaluated.card.aliases)
    merged = merge_all(evaluated.evaluate, names, set(range(40)))
    for row in shards.read(evaluated.evaluate, "predictions").to_pylist():
        if row["mode"] == "two_step":
            top = [evaluated.card.classes[c.class_id] for c in merged[row["image_id"]].candidates]
            assert sorted(row["options"]) == sorted(top[:5])


def test_options_are_not_listed_by_votes(evaluated):
    names = ClassNames(evaluated.card.classes, evaluated.card.aliases)
    merged = merge_all(evaluated.evaluate, names, set(range(40)))
    rows = shards.read(evaluated.evaluate, "predictions").to_pylist()
    rows = [row for row in rows if row["mode"] == "two_step"]
    first = [
        row["options"][0] == evaluated.card.classes[merged[row["image_id"]].candidates[0].class_id]
        for row in rows
    ]
    assert np.mean(first) < 0.5


def test_instalments_save_rollouts_where_all_answers_name_the_truth(split_set, monkeypatch):
    """A third of the images is named rightly by every sample, the others as ever."""
    easy = sorted(r["image_id"] for r in select(split_set.split, "train", ("base",)))[::3]
    usual = FakeEngine._answer

    def answer(self, request, number, sampling):
        if request.key in easy:
            name = request.key.split("/")[2]
            return Completion(f"<think>.</think><answer>{name}</answer>", "stop", 5, -0.1)
        return usual(self, request, number, sampling)

    monkeypatch.setattr(FakeEngine, "_answer", answer)
    folders = {}
    for name, instalments in (("in full", ""), ("in parts", "4 8")):
        folders[name] = split_set.root / name.replace(" ", "-")
        folders[name].mkdir()
        run_stage(propose, folders[name], **propose_arguments(split_set, instalments=instalments))
    stats = {n: json.loads((f / "stats.json").read_text()) for n, f in folders.items()}
    assert "saved" not in stats["in full"]
    saved = stats["in parts"]["saved"]
    assert saved >= 16 * len(easy)
    assert stats["in parts"]["rollouts"] == stats["in full"]["rollouts"] - saved
    counts = Counter(shards.read(folders["in parts"], "rollouts")["image_id"].to_pylist())
    assert {counts[image] for image in easy} == {4}
    assert set(counts.values()) <= {4, 8, 20}
    truth = {r["image_id"]: r["label"] for r in select(split_set.split, "train", ("base",))}
    names = ClassNames(split_set.card.classes, split_set.card.aliases)
    merged = merge_all(folders["in parts"], names, set(range(20)))
    shares = [vote_share(votes, truth[image]) for image, votes in merged.items()]
    assert stats["in parts"]["pass_at_1"] == pytest.approx(np.mean(shares))
    assert stats["in parts"]["pass_at_n"] == pytest.approx(stats["in full"]["pass_at_n"], abs=0.1)
    for image, votes in merged.items():
        if counts[image] < 20:
            assert len(votes.candidates) == 1, "only a question that would be skipped is lost"
    questions = split_set.root / "questions"
    questions.mkdir()
    split_set.propose = folders["in parts"]
    run_stage(build_mcq, questions, **mcq_arguments(split_set, max_lost_share=1.0))
    (figures,) = refreshes([{"round": 0, "build_mcq": str(questions)}])
    assert figures["truth_votes"][20] == sum(count < 20 for count in counts.values())


def test_the_rule_of_instalments_reaches_a_worker_process(split_set):
    names = ClassNames(split_set.card.classes, split_set.card.aliases)
    rule = pickle.loads(pickle.dumps(AllNameTheTruth((4, 8), {"a": 0}, names)))
    said = "<answer>{}</answer>"
    right, wrong, broken = (
        Completion(text, "stop", 1, 0.0)
        for text in (said.format("Rose Gold-Belt"), said.format("rose lime-belt"), "no tags")
    )
    assert rule("a", [right] * 4)
    assert rule.only([]).labels == {}
    assert not rule("a", [right, right, right, wrong])
    assert not rule("a", [right, right, right, broken])


def test_pass_at_k_rises_and_matches_the_votes(evaluated):
    curves = json.loads((evaluated.evaluate / "pass_at_k.json").read_text())
    for group in ("base", "novel"):
        assert len(curves[group]) == 20
        assert curves[group] == sorted(curves[group])
    assert curves["images"] == {"base": 40, "novel": 40}
