"""Is this reward curve normal? Each trouble is said once it is there, and not before."""

import pytest

from training.loop.diagnosis import WINDOW, warnings


def rows(count: int, **columns) -> list[dict]:
    """A log of `count` steps; a column is a value or a function of the step from 0 to 1."""
    base = {"reward": lambda x: 1 + x, "reward/format": 1.0, "completion_length": 100.0}
    made = []
    for number in range(count):
        at = number / max(1, count - 1)
        values = {**base, **columns}
        made.append({k: v(at) if callable(v) else v for k, v in values.items()} | {"step": number})
    return made


def test_a_run_that_learns_is_left_in_peace():
    assert warnings(rows(100, dead_group_share=0.3, clipped_share=0.02)) == {}


def test_nothing_is_said_too_early():
    assert warnings(rows(WINDOW - 1, **{"reward/format": 0.0}, reward=0.0)) == {}


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_a_step_that_ruins_the_weights_is_told_at_once(key):
    assert warnings(rows(2, **{key: 0.5})) == {}
    found = warnings(rows(2, **{key: lambda x: float("nan") if x else 0.5}))
    assert list(found) == ["not finite"]
    assert f"{key} is nan" in found["not finite"]


@pytest.mark.parametrize(
    ("kind", "columns", "says"),
    [
        ("format", {"reward/format": 0.0}, "does not write the tags"),
        ("length", {"completion_length": lambda x: 100 - 90 * x}, "shrunk from"),
        ("clipped", {"clipped_share": 0.8}, "80% of the completions are cut"),
        ("dead", {"dead_group_share": 0.95}, "95% of the groups carry no gradient"),
        ("flat", {"reward": 1.2}, "the reward is flat: 1.20"),
    ],
)
def test_each_trouble_is_named_alone(kind, columns, says):
    found = warnings(rows(60, **columns))
    assert list(found) == [kind]
    assert says in found[kind]


def test_recognition_that_falls_while_the_reward_rises_is_told():
    log = rows(60)
    for step, seen in ((9, 0.6), (29, 0.62), (49, 0.3)):
        log[step]["val_accuracy"] = seen
    assert "fallen to 0.30 from 0.62" in warnings(log)["val"]
    log[49]["val_accuracy"] = 0.6
    assert warnings(log) == {}
