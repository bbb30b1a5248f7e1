"""Constraints without a solution on one Python are found, by the real resolver, without an index."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import pins
from tests.conftest import ROOT

pytestmark = pytest.mark.process


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel with nothing in it but what it requires."""
    facts = "".join(f"Requires-Dist: {each}\n" for each in requires)
    inside = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{inside}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{facts}",
        )
        file.writestr(f"{inside}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{inside}/RECORD", "")


@pytest.fixture
def project(tmp_path, monkeypatch) -> list[str]:
    """A project whose engine wants an old tool where Python is new; returns uv's arguments."""
    monkeypatch.chdir(tmp_path)
    for version in ("1.0", "2.0"):
        wheel(tmp_path, "tool", version)
    wheel(tmp_path, "engine", "1.0", "tool", "tool<2; python_version > '3.11'")
    Path("pyproject.toml").write_text(
        '[project]\nname = "p"\nversion = "1"\nrequires-python = ">=3.11"\n'
        '[project.optional-dependencies]\ncuda = ["engine==1.0"]\ntest = []\n'
    )
    return ["--constraint", "cuda.txt", "--no-index", "--find-links", str(tmp_path), "--no-config"]


def resolved(arguments: list[str], pinned: str, python: str) -> str:
    Path("cuda.txt").write_text(pinned)
    return pins.resolve("cuda", arguments, python, "x86_64-manylinux_2_31")


def test_a_pin_that_one_python_refuses_is_found(project):
    pinned = "engine==1.0\ntool==2.0\n"
    assert resolved(project, pinned, "3.11") == ""
    said = resolved(project, pinned, "3.12")
    assert said.startswith("cuda.txt, Python 3.12, x86_64-manylinux_2_31: no solution\n")
    assert "tool<2" in said
    assert resolved(project, pinned.replace("2.0", "1.0"), "3.13") == ""


def test_what_is_not_pinned_is_named(project):
    assert resolved(project, "engine==1.0\n", "3.12").endswith(
        "not pinned: tool==1.0; add it to the file"
    )


def test_an_index_that_cannot_be_read_is_no_pass(project, monkeypatch):
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    away = ["--constraint", "cuda.txt", "--default-index", "http://127.0.0.1:9/simple"]
    said = resolved([*away, "--no-config", "--no-cache"], "engine==1.0\n", "3.12")
    assert "not checked, the package index cannot be read" in said


def test_the_command_fails_and_names_each(project):
    Path("cuda.txt").write_text("engine==1.0\ntool==2.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pins", "cuda", *project],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, "two Pythons on two processors"
    assert done.stderr.count("no solution") == 4
