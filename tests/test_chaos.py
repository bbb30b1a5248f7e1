"""The harness of faults in its short form: every figure is what it must be.

`python -m tests.chaos --long` does the same at length.
"""

import json
import subprocess
import sys

import pytest

from tests.chaos import hostile, power
from tests.chaos.faults import FAULTS
from tests.chaos.figures import Figure
from tests.conftest import ROOT

ELSEWHERE = ("downloads", "engines")  # test_archives.py and test_crew.py are their short form
IN_SHORT = [name for name in FAULTS if name not in ELSEWHERE]


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("chaos")
    command = [sys.executable, "-m", "tests.chaos", *IN_SHORT, "--json", str(folder / "found.json")]
    ran = subprocess.run(
        [*command, "--folder", str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    told = folder / "found.json"
    assert told.exists(), ran.stdout + ran.stderr
    by_fault: dict[str, list[dict]] = {}
    for row in json.loads(told.read_text())["figures"]:
        by_fault.setdefault(row["fault"], []).append(row)
    return by_fault


@pytest.mark.process
@pytest.mark.parametrize("fault", IN_SHORT)
def test_the_line_survives(figures, fault):
    rows = figures[fault]
    if any(row["figure"].startswith("skipped") for row in rows):
        pytest.skip(rows[0]["figure"])
    assert len([row for row in rows if row["goal"] is not None]) >= 2
    assert [row for row in rows if not row["met"]] == []


def test_a_figure_is_met_when_it_is_its_goal_or_at_most_that():
    assert Figure("x", "y", 3).met
    assert Figure("x", "y", 3, 3).met
    assert not Figure("x", "y", 2, 3).met
    assert Figure("x", "y", 2, 3, at_most=True).met
    assert not Figure("x", "y", 4, 3, at_most=True).met


def test_the_search_for_what_acts_finds_it():
    sound = '<meta http-equiv="Content-Security-Policy"><p>&lt;script&gt;x9evil()</p>'
    assert hostile._acting(sound) == []
    for bad in ("<script>x9evil()</script>", "<img onerror=x9evil()>", "<a href='javascript:x'>"):
        assert hostile._acting(sound + bad)
    assert hostile._acting("<p>no policy</p>")


def test_a_trace_out_of_order_is_noticed():
    def events(*calls: str) -> list:
        return list(power._events("\n".join(f"7 {call} = 0" for call in calls)))

    write, sync = 'write(3</a/x.tmp>, "x", 1)', "fsync(3</a/x.tmp>)"
    rename, folder = 'rename("/a/x.tmp", "/a/x.json")', "fsync(4</a>)"
    assert power._on_disk(events(write, sync, rename), "/a/x.json")
    assert not power._on_disk(events(write, rename), "/a/x.json")
    assert not power._on_disk(events(sync, write, rename), "/a/x.json")
    assert power._synced_after(events(rename, folder)[1:], "/a")
    assert not power._synced_after(events(folder, rename)[2:], "/a")


def test_an_unknown_fault_is_met_with_the_nearest():
    command = [sys.executable, "-m", "tests.chaos", "flip"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "no fault 'flip'; did you mean flips?" in ran.stderr
