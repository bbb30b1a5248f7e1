"""Two real steps of the methods whose rewards look at a whole group: without labels, and in pairs."""

import pytest

from tasks.tables import shards
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
    )  # fmt: skip
    folder = trained(tmp_path / "out", given)
    log = shards.read(folder, "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert all(row["dead_group_share"] == 0 and row["grad_norm"] > 0 for row in log)
    rows = shards.read(folder, "completions").to_pylist()
    paid = [row["reward/frequency"] for row in rows[:4]]
    half, quarter = 0.5 - 0.5 * 0.5, 0.25 - 0.5
    assert paid == pytest.approx([half, quarter, half, -0.5])
    assert rows[0]["advantage"] > 0 > rows[1]["advantage"] > rows[3]["advantage"]
