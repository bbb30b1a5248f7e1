"""Every mode of Evaluate: what is asked, and how its answers are read; other policies by name."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tasks.engines import policies
from tasks.evaluate import evaluate
from tasks.evaluation.modes import injected_options, read_choice, vote_share
from tasks.evaluation.settings import MODES
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge_all
from tasks.questions.options import Option
from tasks.questions.votes import Candidate, Votes
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.split_table import select
from tests.conftest import ENGINE, evaluate_arguments, run_stage


@pytest.fixture
def evaluated(split_set):
    """An evaluation in all modes; its rows by mode and image id."""
    output = split_set.root / "evaluate"
    output.mkdir()
    run_stage(evaluate, output, **evaluate_arguments(split_set, modes=" ".join(MODES)))
    rows = shards.read(output, "predictions").to_pylist()
    split_set.evaluate = output
    split_set.by_mode = {
        mode: {row["image_id"]: row for row in rows if row["mode"] == mode} for mode in MODES
    }
    return split_set


def merged(made, first: int | None = None) -> dict[str, Votes]:
    names = ClassNames(made.card.classes, made.card.aliases)
    return merge_all(made.evaluate, names, set(range(40)), first)


def test_every_test_image_counts_in_every_mode(evaluated):
    wanted = {row["image_id"] for row in select(evaluated.split, "test", ("base", "novel"))}
    for mode in MODES:
        assert evaluated.by_mode[mode].keys() == wanted
        for row in evaluated.by_mode[mode].values():
            assert row["correct"] == (row["class_id"] == row["label"])
            assert row["status"]


def test_with_the_truth_injected_it_stands_in_every_question(evaluated):
    votes = merged(evaluated)
    rows = evaluated.by_mode["mcq"].values()
    added = 0
    for row in rows:
        truth = evaluated.card.classes[row["label"]]
        assert truth in row["options"]
        assert row["truth_letter"] == "ABCDE"[row["options"].index(truth)]
        top = [evaluated.card.classes[c.class_id] for c in votes[row["image_id"]].candidates]
        if truth in top[:5]:
            assert sorted(row["options"]) == sorted(top[:5])
        else:
            added += 1
            assert sorted(row["options"]) == sorted([*top[:4], truth])
    two_step = evaluated.by_mode["two_step"].values()
    assert sum(row["truth_letter"] == "" for row in two_step) == added


def test_letters_are_right_equally_often_when_the_truth_is_injected(evaluated):
    rows = evaluated.by_mode["mcq"].values()
    for count in (2, 3, 4, 5):
        letters = Counter(r["truth_letter"] for r in rows if len(r["options"]) == count)
        if letters:
            assert max(letters.values()) - min(letters["ABCDE"[i]] for i in range(count)) <= 1


def test_a_letter_is_the_option_chosen_however_it_was_said(evaluated):
    for mode in ("two_step", "mcq", "constrained"):
        rows = evaluated.by_mode[mode].values()
        assert any(row["letter"] for row in rows)
        for row in rows:
            if row["letter"]:
                place = "ABCDE".index(row["letter"])
                assert evaluated.card.classes[row["class_id"]] == row["options"][place]
    for mode in ("one_step", "majority"):
        assert {r["letter"] + r["truth_letter"] for r in evaluated.by_mode[mode].values()} == {""}


def test_letters_alone_are_asked_about_the_options_of_two_step(evaluated):
    for key, row in evaluated.by_mode["constrained"].items():
        assert row["options"] == evaluated.by_mode["two_step"][key]["options"]
        assert row["status"] in ("letter", "single_candidate", "no_candidates")
        if row["status"] == "letter":
            assert row["completion"] == row["letter"]


def test_vote_shares_are_those_of_the_answered_class(evaluated):
    used = {
        row["image_id"]: row
        for row in shards.read(evaluated.evaluate, "adaptive_counts").to_pylist()
    }
    votes = {count: merged(evaluated, count) for count in (4, 8, 20)}
    for mode in MODES:
        for key, row in evaluated.by_mode[mode].items():
            n = used[key]["num_rollouts"] if mode == "adaptive" else 20
            counts = {c.class_id: c.votes for c in votes[n][key].candidates}
            assert row["vote_share"] == pytest.approx(counts.get(row["class_id"], 0) / n)
    majority = evaluated.by_mode["majority"]
    assert all(majority[key]["vote_share"] >= row["vote_share"] - 1e-6
               for key, row in evaluated.by_mode["one_step"].items())  # fmt: skip


def test_further_modes_leave_the_others_as_they_are(evaluated, tmp_path):
    output = tmp_path / "three"
    output.mkdir()
    run_stage(
        evaluate,
        output,
        **evaluate_arguments(evaluated, modes="one_step majority two_step"),
    )
    for row in shards.read(output, "predictions").to_pylist():
        assert row == evaluated.by_mode[row["mode"]][row["image_id"]]
    assert not list(output.glob("mcq-*"))


def test_one_step_alone_samples_nothing(split_set, tmp_path):
    output = tmp_path / "one"
    output.mkdir()
    run_stage(evaluate, output, **evaluate_arguments(split_set, modes="one_step"))
    rows = shards.read(output, "predictions").to_pylist()
    assert {row["mode"] for row in rows} == {"one_step"}
    assert all(row["vote_share"] is None for row in rows)
    assert not list(output.glob("rollouts-*"))
    assert json.loads((output / "stats.json").read_text())["images"] == len(rows) == 80


def test_a_mode_that_cannot_be_is_named(split_set, tmp_path):
    output = tmp_path / "e"
    output.mkdir()
    with pytest.raises(StageError, match=r"modes must name some of one_step, .*'two_steps'"):
        run_stage(evaluate, output, **evaluate_arguments(split_set, modes="two_steps"))
    with pytest.raises(StageError, match=r"modes must name some of one_step, .*; got none"):
        run_stage(evaluate, output, **evaluate_arguments(split_set, modes=" "))
    engine = replace(ENGINE, backend="tests.fakes:free_engine")
    with pytest.raises(StageError, match=r"FakeEngine cannot keep answers to given letters"):
        run_stage(
            evaluate, output, **evaluate_arguments(split_set, modes="constrained", engine=engine)
        )


def votes_of(*class_ids: int) -> Votes:
    found = [Candidate(class_id, 5 - i, -1.0) for i, class_id in enumerate(class_ids)]
    return Votes(found, 20, 0, 0, [])


def test_the_injected_truth_takes_the_place_of_the_fewest_votes():
    votes = {"a": votes_of(1, 2, 3), "b": votes_of(7), "c": votes_of(), "d": votes_of(4)}
    found = injected_options(votes, {"a": 9, "b": 7, "c": 1, "d": 5}, 3, seed=0)
    assert {option.class_id for option in found["a"]} == {1, 2, 9}
    assert [o.source for o in found["a"] if o.class_id == 9] == ["truth"]
    assert [option.class_id for option in found["b"]] == [7], "only the truth was ever proposed"
    assert found["c"] == []
    assert {option.class_id for option in found["d"]} == {4, 5}


@pytest.mark.parametrize(
    ("completion", "class_id", "letter", "status"),
    [("B", 3, "B", "letter"), (" A ", 2, "A", "letter"), ("C", None, "", "unknown"),
     ("", None, "", "no_answer"), ("AB", None, "", "unknown")],
)  # fmt: skip
def test_a_bare_letter_is_read_as_one(few_beetles, completion, class_id, letter, status):
    options = [Option(2, 5, "policy"), Option(3, 4, "policy")]
    found = read_choice(completion, options, few_beetles, constrained=True)
    assert (found.class_id, found.letter, found.status) == (class_id, letter, status)


def test_no_class_has_no_votes():
    assert vote_share(votes_of(1, 2), None) == 0
    assert vote_share(votes_of(1, 2), 2) == 4 / 20


def test_a_policy_is_known_by_what_it_holds(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(policies.PolicyError, match=r"not a model's folder \(no config.json\)"):
        policies.identity(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(policies.PolicyError, match=r"name it in \[engine\] lora"):
        policies.identity(str(folder))
    (folder / "config.json").write_text("{}")
    weights = np.zeros(3_000_000, np.uint8)
    (folder / "model.safetensors").write_bytes(weights.tobytes())
    first = policies.identity(str(folder))
    moved = folder.rename(tmp_path / "moved")
    assert policies.identity(str(moved)) == first
    weights[1_500_000:] = 1
    (moved / "model.safetensors").write_bytes(weights.tobytes())
    assert policies.identity(str(moved)) != first
    (moved / "manifest.json").write_text('{"stage": "Train", "fingerprint": "abc"}')
    assert policies.identity(str(moved)) == "abc"
    assert policies.name(str(moved)) == "Train-abc"
    assert policies.local(moved) == moved


def test_a_hub_id_is_told_from_a_folder_that_is_not_there(tmp_path, monkeypatch):
    assert policies.identity("owner/model@v1") == "owner/model@v1"
    assert policies.name("owner/model@v1") == "owner--model@v1"
    with pytest.raises(policies.PolicyError, match="no such folder, and no hub id"):
        policies.identity("/nowhere/at/all")
    asked = []

    def download(repo, revision):
        asked.append((repo, revision))
        if repo == "owner/lost":
            raise OSError("404\nlong story")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert policies.local("owner/model@v1") == tmp_path
    assert asked == [("owner/model", "v1")]
    with pytest.raises(policies.PolicyError, match=r"policy owner/lost: .*cannot be had \(404\)"):
        policies.local("owner/lost")


def test_the_images_are_those_of_the_part_that_is_set(split_set, tmp_path):
    """A policy may be evaluated on val images of base classes and test images of novel ones."""
    rows = shards.read(split_set.split, "split").to_pylist()
    for part, of_base, of_novel in (
        ("val", "val", "val"),
        ("base_val_novel_test", "val", "test"),
        ("test", "test", "test"),
    ):
        output = tmp_path / part
        output.mkdir()
        run_stage(evaluate, output, **evaluate_arguments(split_set, part=part, modes="one_step"))
        wanted = {
            row["image_id"]
            for row in rows
            if row["split"] == (of_base if row["group"] == "base" else of_novel)
        }
        evaluated = shards.read(output, "predictions")["image_id"].to_pylist()
        assert sorted(evaluated) == sorted(wanted)
        assert wanted
    kept = [row for row in rows if (row["group"], row["split"]) != ("base", "val")]
    shards.write(split_set.split / "split.parquet", kept, schemas.split(split_set.card.classes))
    (tmp_path / "none").mkdir()
    arguments = evaluate_arguments(split_set, part="base_val_novel_test", modes="one_step")
    with pytest.raises(StageError, match="holds no val image of base classes"):
        run_stage(evaluate, tmp_path / "none", **arguments)
