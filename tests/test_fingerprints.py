"""Every stage keeps its fingerprint, so that no artifact is made anew by a change that changes nothing.

A change that is meant to change results raises the stage's `code_version` or adds a setting, and then
the frozen fingerprints: `python -m tests.test_fingerprints`.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT, recipe_files

FROZEN = ROOT / "tests" / "fingerprints.json"
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.cfg"))


# Name -> the recipes read over luigi.cfg, and the task whose graph is fingerprinted.
GRAPHS = {
    "default": ("", "TrainDiVE"),
    "Compare": ("", "Compare"),
    **{path.stem: (",".join(map(str, recipe_files(path))), "TrainDiVE") for path in RECIPES},
}
LISTED = """
import json, sys
from tests.conftest import ROOT
from pipeline import tasks
from pipeline.cli import status
dataset = {"dataset": "cub"} if sys.argv[2] else {}
graph = status.graph(getattr(tasks, sys.argv[1])(**dataset))
names = ("dataset", "subset", "method", "refresh_round", "seed")
told = {
    " ".join([s.task_family, *(str(v) for n in names if (v := getattr(s, n, None)) not in (None, ""))]):
    s.fingerprint for s in graph
}
print(json.dumps(told))
"""


def fingerprints(name: str) -> dict[str, str]:
    """Each stage of a graph, by name and place in the graph -> its fingerprint."""
    recipe, task = GRAPHS[name]
    done = subprocess.run(
        [sys.executable, "-c", LISTED, task, recipe],
        cwd=ROOT,
        env={**os.environ, "RECIPE": recipe, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize("name", GRAPHS)
def test_fingerprints_are_those_that_were_frozen(name):
    assert fingerprints(name) == json.loads(FROZEN.read_text())[name]


if __name__ == "__main__":
    frozen = {name: fingerprints(name) for name in GRAPHS}
    FROZEN.write_text(json.dumps(frozen, indent=1, sort_keys=True) + "\n")
