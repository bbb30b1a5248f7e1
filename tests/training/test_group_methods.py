"""Two real steps of the methods whose rewards look at a whole group: without labels, and in pairs."""

import json

import pytest

from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.schemas import JOINT
from tests.conftest import run_stage
from tests.training.test_grpo import arguments, frozen, trained, write_manifest  # noqa: F401

pytestmark = pytest.mark.model


def test_a_policy_trains_without_labels(frozen, tmp_path, drawn_once, monkeypatch):
    """An untrained policy answers nothing, so it is given answers: two classes and a broken one."""
    import data_cards
    from tasks.build_open import build_open
    from tests.training import answering

    mcq = tmp_path / "open"
    mcq.mkdir()
    place = {"card": "few", "download": frozen / "download", "split": frozen / "split"}
    own = {"prompt": "open", "prompt_style": "brief", "shard_size": 100, "seed": 0}
    run_stage(build_open, mcq, **place, **own, unlabelled_groups="base novel")
    write_manifest(mcq)
    names = data_cards.load("few").classes
    answering.give(monkeypatch, [names[0], names[1], names[0], "no such beetle"])
    given = arguments(
        frozen, method="ttrv", ask="open", mcq=[mcq], download=[], split=[], steps=2,
        rewards={"frequency": 1.0}, entropy_weight=0.5, reading={"few": {"vocabulary": "closed"}},
        unlabelled="train images of base and novel classes of few",
    )  # fmt: skip
    folder = trained(tmp_path / "out", given)
    log = shards.read(folder, "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["dead_group_share"] == 0 and row["grad_norm"] > 0 for row in log)
    rows = shards.read(folder, "completions").to_pylist()
    paid = [row["reward/frequency"] for row in rows[:4]]
    half, quarter = 0.5 - 0.5 * 0.5, 0.25 - 0.5
    assert paid == pytest.approx([half, quarter, half, -0.5])
    card = (folder / "README.md").read_text()
    assert "Trained without labels on the train images of base and novel classes of few." in card
    assert "base classes only" not in card
    assert rows[0]["advantage"] > 0 > rows[1]["advantage"] > rows[3]["advantage"]


def test_a_policy_trains_on_pairs_of_questions(frozen, tmp_path, drawn_once, monkeypatch, capsys):
    """Each group answers A, B, C, A: what it earns depends on its partner's group."""
    from tests.training import answering

    answering.give(monkeypatch, ["A", "B", "C", "A"])
    trl = {"beta": 0.0, "use_cpu": True, "scale_rewards": "batch"}
    given = arguments(
        frozen, method="contrast", pairs=True, steps=2, questions_per_step=4, trl=trl,
        rewards={"contrast": 1.0},
    )  # fmt: skip
    folder = trained(tmp_path / "out", given)
    assert "questions have a partner" in capsys.readouterr().out
    assert json.loads((folder / "stats.json").read_text())["plain_questions"] >= 0
    log = shards.read(folder, "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert any(row["grad_norm"] > 0 for row in log)
    earned: dict[tuple[int, str], list[float]] = {}
    for row in shards.read(folder, "completions").to_pylist():
        earned.setdefault((row["step"], row["mcq_id"]), []).append(row["reward/contrast"])
    pairs = [(step, name) for step, name in earned if JOINT in name]
    assert pairs
    for step, name in pairs:
        other = earned[step, name.partition(JOINT)[0]]
        shares = [sum(value > 0 for value in values) / 4 for values in (earned[step, name], other)]
        if all(shares):
            assert max(earned[step, name]) == shares[1]
            assert max(other) == shares[0]
    assert any(max(values) in (0.25, 0.5) for values in earned.values())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dynamic_sampling": 1}, "dynamic_sampling would replace one"),
        ({"questions_per_step": 1}, "questions_per_step must be at least 2"),
        (
            {"trl": {"steps_per_generation": 4}, "save_steps": 2},
            "steps_per_generation = 4 would put",
        ),
        ({"trl": {"scale_rewards": "group"}}, "divides away what contrast pays"),
        (
            {
                "trl": {
                    "multi_objective_aggregation": "normalize_then_sum",
                    "scale_rewards": "group",
                }
            },
            'normalize_then_sum" divides away what contrast pays',
        ),
        ({"pairs": False}, "contrast is for the pairs of the method contrast"),
    ],
)
def test_what_tears_pairs_apart_is_refused(frozen, tmp_path, changed, told):
    trl = {"use_cpu": True, "scale_rewards": "batch", **changed.get("trl", {})}
    given = {"pairs": True, "rewards": {"contrast": 1.0}, **changed, "trl": trl}
    with pytest.raises(StageError, match=told):
        trained(tmp_path / "out", arguments(frozen, **given))
