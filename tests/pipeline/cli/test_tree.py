"""python -m pipeline status: the graph as a tree, what a run would do, and how wide it gets."""

import json
import os
import subprocess
import sys

import pytest

from pipeline import tasks
from pipeline.cli import status, tree
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture

DONE = {"rows": {"mcq": 1200}, "bytes": 5_100_000, "seconds": 150.0, "created": "2026-01-02T03:04:05Z"}  # fmt: skip


def row(name: str, *requires: str, state: str = "done", **changed) -> dict:
    """What `status.describe` says of a stage; its fingerprint is its name."""
    facts = {"stage": name, "round": None, "method": "", "set": "few", "seed": 0, "why": []}
    facts |= {"fingerprint": name, "requires": list(requires), "state": state}
    return facts | (DONE if state == "done" else {}) | changed


def names(told: list[str]) -> list[str]:
    """The first column, without the line of column names and the closing ones."""
    return [line.split("  done")[0].rstrip() for line in told[1:-2]]


def test_what_a_stage_requires_stands_below_it_once_and_then_above():
    rows = [
        row("Download"),
        row("Split", "Download"),
        row("Train", "Split", "Download"),  # Download comes by way of Split
        row("Evaluate", "Split", "Train"),
        row("Judge", "Split"),
        row("Report", "Evaluate", "Judge", "Download"),
    ]
    assert names(tree.lines(rows)) == [
        "Report",
        "├─ Evaluate",
        "│  └─ Train",
        "│     └─ Split",
        "│        └─ Download",
        "└─ Judge",
        "   └─ Split (above)",
    ]
    assert names(tree.lines(rows, ascii_only=True))[1:4] == [
        "|- Evaluate",
        "|  `- Train",
        "|     `- Split",
    ]


def test_several_roots_hang_below_what_was_asked_for():
    rows = [row("a"), row("b"), row("c", "b")]
    told = tree.lines(rows, "TrainDiVE few+more")
    assert told[0].startswith("TrainDiVE few+more ")
    assert names(told) == ["├─ a", "└─ c", "   └─ b"]


def test_a_run_does_not_look_beyond_what_is_complete():
    rows = [
        row("Download", state="missing"),
        row("Split", "Download"),
        row("Propose", "Split", state="missing"),
        row("Train", "Propose", state="partial", shards=0),
    ]
    assert tree.would_run(rows) == {"Propose", "Train"}
    told = tree.lines(rows)
    assert told[-1] == "a run would do 2 of 4 stages"
    (unneeded,) = [line for line in told if "Download" in line]
    assert unneeded.endswith("missing  a run leaves it: what reads it is there")


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({}, "1,200    5.1 MB   2.5 min  2026-01-02 "),
        ({"rows": {}}, "done                    5.1 MB"),
        ({"state": "partial", "shards": 5, "of": 8, "seconds": 61.0}, "5 of 8 shards finished; 61.0 s spent; a run goes on from there"),
        ({"state": "partial", "shards": 3, "held_by": "process 7 on b"}, "3 shards finished; process 7 on b is at work on it"),
        ({"state": "partial", "shards": 12, "progress": {"unit": "steps", "done": 12, "total": 20}}, "partial  12 of 20 steps; a run goes on"),
        ({"state": "partial", "shards": 12, "held_by": "process 7", "progress": {"unit": "steps", "done": 12, "total": 20, "now": "generating"}}, "partial  12 of 20 steps, generating; process 7 is at work"),
        ({"state": "partial", "shards": 1, "of": 3, "progress": {"what": "evaluate: majority", "unit": "images"}}, "partial  majority: 1 of 3 shards finished; a run"),
        ({"state": "stale", "why": ["val_share 0.3 -> 0.1"]}, "stale    a run makes it anew"),
        ({"state": "missing"}, "missing  a run makes it"),
    ],
)  # fmt: skip
def test_each_state_says_what_there_is_and_what_a_run_does(facts, told):
    lines = tree.lines([row("Propose", **facts)])
    assert told in lines[1]
    assert [line.strip() for line in lines[2:-2]] == facts.get("why", [])


def test_changed_inputs_are_one_line_and_long_reasons_are_wrapped():
    why = ["prompt " + "word " * 40, *(f"input policy{i} changed" for i in range(9))]
    told = tree.lines([row("Propose", state="stale", why=why)])
    assert max(map(len, told)) <= tree.WIDTH
    inputs = [f"policy{i}" for i in range(tree.SHOWN)]
    assert f"inputs changed: {', '.join(inputs)} and 3 more" in " ".join(" ".join(told).split())


def test_the_tree_of_the_whole_comparison_is_narrow_and_says_each_stage_once(config, tmp_path):
    config.set("run", "artifacts", str(tmp_path))
    rows = [status.describe(stage) for stage in status.graph(tasks.Compare())]
    told = tree.lines(rows)
    assert max(map(len, told)) <= 110
    found = [line for line in told[1:-2] if "(above)" not in line]
    assert len(found) == len({row["fingerprint"] for row in rows}) == 87
    assert sum("Propose 0 seed 1" in line for line in found) == 1, "shared by all methods"
    assert any(line.startswith("├─ Evaluate zero_shot seed 1 ") for line in told)


def test_of_a_mix_stages_bear_the_name_of_their_set(config, tmp_path):
    config.set("run", "artifacts", str(tmp_path))
    mix = tasks.TrainDiVE(dataset="pets+flowers", method="dive_k", seed=0)
    told = tree.lines([status.describe(stage) for stage in status.graph(mix)], "TrainDiVE")
    for name in ("Report dive_k pets", "Report dive_k flowers", "BasePolicy pets+flowers"):
        assert any(f"─ {name} " in line for line in told), name


@pytest.mark.parametrize(("encoding", "branch"), [("ascii", "`- "), ("utf-8", "└─ ")])
def test_a_terminal_without_the_characters_gets_plain_ones(tmp_path, encoding, branch):
    text = (ROOT / "luigi.cfg").read_text(encoding="utf-8")
    text = text.replace("artifacts = artifacts", f"artifacts = {tmp_path}")
    (tmp_path / "luigi.cfg").write_text(text, encoding="utf-8")

    def told(*line: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline", "status", *line],
            cwd=tmp_path, capture_output=True, check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        )  # fmt: skip
        return ran.stdout.decode(encoding)

    assert f"\n{branch}Report dive_k " in told()
    rows = json.loads(told("Train", "--refresh-round", "1", "--json"))
    assert (rows[-1]["stage"], rows[-1]["round"], rows[-1]["would_run"]) == ("Train", 1, True)
    known = {row["fingerprint"] for row in rows}
    assert all(set(row["requires"]) <= known for row in rows)
