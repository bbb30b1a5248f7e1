"""An artifact tells of every module of ours that made it, and of those that changed since."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pipeline.artifacts import source_code
from tasks.tables.manifest import Manifest
from tests.conftest import ROOT

STAGES = """
import ast
import graphlib
import json
from pipeline.artifacts import source_code
from pipeline.tasks import *
given = dict(dataset="beetles", seed=0)
r = dict(given, method="dive_k", refresh_round=0)
stages = [Download(dataset="beetles"), Split(**given), BasePolicy(**given), Propose(subset="", **r),
          BuildMCQ(subset="", **r), Train(**r), Evaluate(subset="", **r)]
print(json.dumps({s.task_family: source_code.digests(s.module) for s in stages}))
"""


def stages(root) -> dict[str, dict[str, str]]:
    """The modules of each stage, as a process that runs in a copy of the project sees them."""
    done = subprocess.run(
        [sys.executable, "-c", STAGES],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "stale"),
    [
        ("tasks/questions/options.py", {"BuildMCQ", "Evaluate"}),
        ("training/rewards.py", {"Train"}),
        ("training/shared_prefix/attention.py", {"Train"}),
        ("tasks/ingest/layouts.py", {"Download"}),
        ("tasks/ingest/split_draws.py", {"Split"}),
        ("training/model/tiny_policy.py", {"BasePolicy"}),
    ],
)
def test_a_changed_line_is_seen_by_the_stages_that_run_it_and_by_no_other(module, stale, tmp_path):
    for room in ("pipeline", "tasks", "training", "data_cards"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "luigi.cfg", tmp_path)
    before = stages(tmp_path)
    path = tmp_path / module
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    after = stages(tmp_path)
    assert {name for name in before if before[name] != after[name]} == stale
    for name in stale:
        assert before[name].keys() == after[name].keys()
        assert [m for m in before[name] if before[name][m] != after[name][m]] == [module]


def test_what_changed_is_named_and_older_manifests_know_one_module():
    now = source_code.digests("tasks.split")
    assert source_code.changed(Manifest(sources=now), "tasks.split") == []
    then = {**now, "tasks/gone.py": "0", "tasks/tables/shards.py": "0"}
    then.pop("tasks/split.py")
    names = ["tasks/gone.py", "tasks/split.py", "tasks/tables/shards.py"]
    assert source_code.changed(Manifest(sources=then), "tasks.split") == names
    assert "tasks/gone.py" in source_code.change_note(names)
    assert source_code.changed(Manifest(source_sha256="0"), "tasks.split") == ["tasks/split.py"]


def test_the_templates_of_a_page_count_with_it():
    pages = {f"tasks/pages/{name}" for name in ("report.html.jinja", "charts.css", "questions.js")}
    assert pages <= source_code.digests("tasks.report").keys()
    assert not pages & source_code.digests("tasks.build_mcq").keys()


def test_imports_inside_functions_and_over_several_lines_are_found():
    found = source_code.digests("tasks.engines.sampler")
    assert "tasks/engines/ray_pool.py" in found  # within a function
    assert "tasks/stages.py" not in found
    assert not any(name.startswith(("pipeline/", "tests/")) for name in found)
