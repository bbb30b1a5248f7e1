"""The command line of Luigi: errors in one sentence, unchanged runs that do nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_few_card


def luigi_run(folder: Path, *arguments: str, **changed) -> subprocess.CompletedProcess:
    """The luigi command in a folder whose luigi.cfg is the default one with lines changed."""
    text = (ROOT / "luigi.cfg").read_text()
    for old, new in changed.get("replace", {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "luigi.cfg").write_text(text)
    write_few_card(folder / "cards")
    command = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", *arguments]
    command += ["--dataset", changed.get("dataset", "few")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.process
def test_the_command_reports_a_misspelt_key_in_one_sentence(tmp_path):
    ran = luigi_run(
        tmp_path, "TrainDiVE", replace={"num_options = 4\nprompt": "num_optons = 4\nprompt"}
    )
    assert ran.returncode == 1
    assert "error: luigi.cfg: section [Evaluate] has no key 'num_optons'" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.process
def test_a_failing_stage_exits_with_30_and_one_sentence(tmp_path):
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "gone.md").write_text(
        "---\nversion: 1\nnoun: bird\nkind: species\nsource: {kind: folder, path: nowhere}\n"
        "classes: [kite, buzzard]\n---\n"
    )
    ran = luigi_run(tmp_path, "Download", dataset="gone")
    assert ran.returncode == 30, ran.stderr
    assert "Download failed: card gone: source.path nowhere is not a folder" in ran.stderr
    assert "Traceback" not in ran.stderr
    made = [p.name for p in (tmp_path / "artifacts" / "gone" / "download").iterdir()]
    assert [name for name in made if not name.endswith(".partial")] == []


@pytest.mark.process
def test_an_unchanged_rerun_runs_nothing(tmp_path):
    assert luigi_run(tmp_path, "Download").returncode == 0
    manifests = list(tmp_path.glob("artifacts/few/*/*/manifest.json"))
    before = {path: path.stat().st_mtime_ns for path in manifests}
    again = luigi_run(tmp_path, "Download")
    assert again.returncode == 0
    assert "1 complete ones were encountered" in again.stderr
    assert "ran successfully" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "artifacts/few/download/current/images-00000.parquet").exists()
