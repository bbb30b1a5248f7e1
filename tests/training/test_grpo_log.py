"""What a run logs, replaces, watches and keeps."""

import json

import numpy as np
import pytest

from tasks.tables import shards
from tests.training.test_grpo import arguments, digest, frozen, trained  # noqa: F401

pytestmark = pytest.mark.model


def test_the_log_tells_parts_times_and_dead_groups(frozen, tmp_path):
    given = arguments(frozen, rewards={"tests.paid:equal": 0.5, "letter": 1.0}, steps=2)
    folder = trained(tmp_path / "out", given)
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["reward/tests.paid:equal"] == 1.0
        assert row["reward"] == pytest.approx(0.5 + row["reward/letter"])
        assert row["dead_group_share"] == 1.0
        assert row["advantage_spread"] == 0.0
        parts = [row[f"seconds_{what}"] for what in ("generation", "reward", "update")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(row["seconds"], rel=1e-3)
        assert row["tokens_per_second"] > 0
        assert 1 <= row["completion_length"] <= 8
    rows = shards.read(folder, "completions").to_pylist()
    assert len(rows) == 2 * 2 * 4
    assert {row["image_id"].split("/")[0] for row in rows} == {"few"}
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["dead_group_share"] == 1.0
    assert stats["steps"] == [1, 2]


def test_a_reward_that_fails_is_told_once_and_counts_nothing(frozen, tmp_path, capsys):
    given = arguments(
        frozen, rewards={"tests.paid:broken": 1.0, "tests.paid:by_length": 1.0}, steps=2
    )
    folder = trained(tmp_path / "out", given)
    told = capsys.readouterr().err
    assert told.count("reward tests.paid:broken failed") == 1
    assert "colour" in told
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["reward/tests.paid:broken"] is None
        assert row["reward"] == pytest.approx(row["reward/tests.paid:by_length"], abs=1e-6)


def test_values_that_cannot_be_summed_take_no_gradient_from_the_others(frozen, tmp_path, capsys):
    given = arguments(frozen, rewards={"tests.paid:now_and_then_infinite": 1.0}, steps=2)
    folder = trained(tmp_path / "out", given)
    assert capsys.readouterr().err.count("gave inf, which cannot be summed") == 1
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["grad_norm"] > 0
        assert np.isfinite(row["reward/tests.paid:now_and_then_infinite"])


def test_a_reward_that_never_scored_is_told_at_the_end_and_no_gradient_is_claimed(
    frozen, tmp_path, capsys
):
    given = arguments(frozen, rewards={"tests.paid:broken": 1.0}, steps=2)
    folder = trained(tmp_path / "out", given)
    shown = capsys.readouterr()
    assert "tests.paid:broken has scored no completion of this round" in shown.err
    assert "tests.paid:broken never scored, 100% of the groups without a gradient" in shown.out
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["dead_group_share"] == 1.0
        assert row["reward/tests.paid:broken"] is None


@pytest.mark.parametrize(
    ("way", "rewards", "equal"),
    [
        ("sum_then_normalize", [[1, 0], [0, 1], [1, 0], [1, 1]], [True, False]),
        ("normalize_then_sum", [[1, 0], [1, 1], [1, 0], [1, 0]], [False, True]),
        # Divided by their own standard deviations these two cancel out, and so do TRL's advantages.
        ("normalize_then_sum", [[1, 0], [0, 1], [1, 0], [1, 0]], [True, True]),
        # What no function scored is left out, and so is a group with one completion that is scored.
        ("sum_then_normalize", [[None, None], [1, 0], [None, 1], [1, 0]], [True, True]),
        ("sum_then_normalize", [[None, None]] * 4, [True, True]),
        ("normalize_then_sum", [[None, 1], [1, 1], [None, 1], [None, 2]], [True, False]),
    ],
)
def test_a_group_has_no_gradient_where_its_scored_completions_earn_alike(way, rewards, equal):
    from types import SimpleNamespace

    import torch

    from training.data.aggregation import equal_groups

    trainer = SimpleNamespace(
        reward_weights=torch.ones(2), multi_objective_aggregation=way, num_generations=2
    )
    values = [[float("nan") if v is None else float(v) for v in row] for row in rewards]
    assert equal_groups(trainer, torch.tensor(values)).tolist() == equal


def test_groups_without_a_gradient_are_replaced_by_further_questions(frozen, tmp_path):
    asked, before = {}, 1.0
    for attempts in (0, 3):
        given = arguments(frozen, dynamic_sampling=attempts, steps=2)
        given["rewards"] = {"tests.paid:on_some_questions": 1.0}
        folder = trained(tmp_path / f"{attempts}", given)
        log = shards.read(folder, "train_log").to_pylist()
        asked[attempts] = shards.read(folder, "completions")["mcq_id"].to_pylist()
        replaced = [row["replaced_group_share"] for row in log]
        dead = np.mean([row["dead_group_share"] for row in log])
        if attempts:
            assert np.mean(replaced) > 0
            assert dead < before
        else:
            assert replaced == [None, None]
            before = dead
            assert before > 0
    assert asked[0] != asked[3]
    again = trained(tmp_path / "again", {**given})
    assert shards.read(again, "completions")["mcq_id"].to_pylist() == asked[3]


def test_looking_for_further_questions_makes_ready_and_scores_once(frozen, tmp_path, monkeypatch):
    from training.loop.sampling import DynamicSampling
    from training.model.processors import load_processor
    from training.shared_prefix.prompts_once import _digest, _flat

    kind = type(load_processor(frozen / "policy").image_processor)
    ready, own, batch = [], kind.__call__, DynamicSampling._with_further
    scored, score = [], DynamicSampling._dead
    batches = []  # of each: the pictures that were made ready, and the rows that were scored

    def call(self, images, *arguments, **named):
        ready.extend(map(_digest, _flat(images)))
        return own(self, images, *arguments, **named)

    def dead(self, rows, samples):
        scored.append(rows)
        return score(self, rows, samples)

    def further(self, inputs):
        starts = len(ready), len(scored)
        made = batch(self, inputs)
        batches.append((ready[starts[0] :], scored[starts[1] :]))
        return made

    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(DynamicSampling, "_dead", dead)
    monkeypatch.setattr(DynamicSampling, "_with_further", further)
    given = arguments(frozen, dynamic_sampling=3, steps=2, check_shared_prefix=False)
    given |= {"questions_per_step": 4, "rewards": {"tests.paid:on_some_questions": 1.0}}
    folder = trained(tmp_path / "out", given)
    log = shards.read(folder, "train_log").to_pylist()
    assert any(row["replaced_group_share"] for row in log)
    assert len(batches) == 2
    sizes = []
    for pictures, (first, *others) in batches:
        assert len(pictures) == len(set(pictures)) > 0
        fresh = [rows for rows in others if rows is not first]
        assert len(fresh) == len({id(rows) for rows in fresh})
        sizes += map(len, fresh)
    assert max(sizes) > 4, "several groups were looked for at once"


def test_the_truth_can_be_one_of_every_groups_completions(frozen, tmp_path):
    from tasks.language.answers import choose

    given = arguments(frozen, truth_rollout=True, steps=2, rewards={"letter": 1.0, "format": 1.0})
    folder = trained(tmp_path / "out", {**given, "max_completion_length": 32})
    rows = shards.read(folder, "completions").to_pylist()
    for start in range(0, len(rows), 4):
        *_, truth = group = rows[start : start + 4]
        assert len({row["mcq_id"] for row in group}) == 1
        assert truth["reward/letter"] == truth["reward/format"] == 1.0
        assert truth["advantage"] > 0
        assert choose(truth["completion"], ["x", "y"]).index is None or truth["completion"]


def test_val_images_are_watched_and_the_best_policy_is_kept(frozen, tmp_path, monkeypatch):
    from training.loop.validation import Watch

    seen = iter([0.2, 0.5, 0.3, 0.4] * 2)
    monkeypatch.setattr(Watch, "_answers", lambda self, trainer, model, part: self.fake(part))
    share = {"now": 0.0}

    def fake(self, part):
        if part[0] is self.samples[0]:
            share["now"] = next(seen)
        right = round(share["now"] * len(part))
        names = [self.cards_names[s.label] for s in part]
        return [
            f"<think>x</think><answer>{n if i < right else 'x'}</answer>"
            for i, n in enumerate(names)
        ]

    import data_cards

    monkeypatch.setattr(Watch, "fake", fake, raising=False)
    monkeypatch.setattr(Watch, "cards_names", data_cards.load("few").classes, raising=False)
    weights = {}
    for keep in ("last", "best"):
        given = arguments(frozen, watch_every=1, watch_images=10, keep_policy=keep)
        folder = trained(tmp_path / keep, given)
        log = shards.read(folder, "train_log").to_pylist()
        assert [row["val_accuracy"] for row in log] == pytest.approx(
            [0.2, 0.5, 0.3, 0.4], abs=0.051
        )
        other = {"last": "best", "best": "last"}[keep]
        weights[keep] = digest(folder / "model.safetensors")
        weights[f"{keep}'s {other}"] = digest(folder / other / "model.safetensors")
        stats = json.loads((folder / "stats.json").read_text())
        assert stats["policy_step"] == {"last": 4, "best": 2}[keep]
    assert weights["last"] == weights["best's last"] != weights["best"] == weights["last's best"]


def test_the_card_names_what_it_came_from_and_no_path(frozen, tmp_path):
    from huggingface_hub import ModelCard

    folder = trained(tmp_path / "out", arguments(frozen, steps=1))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    text = (folder / "README.md").read_text()
    assert "cc0-1.0" in text
    assert "dive_k" in text
    assert str(tmp_path) not in text
    assert str(frozen) not in text
