"""`make pythons` runs the quick tests on the other Pythons that it finds, and names those it did not."""

from pathlib import Path

import pytest

from tests import interpreters

# Stands for an interpreter of version {0}, which also makes environments, as uv does.
STUB = """#!/bin/sh
echo "{0} $*" >>NOTES
case "$1" in
-c) echo {0} ;;
venv) for last; do :; done; mkdir -p $last/bin; cp {1} $last/bin/python ;;
-m) exit {2} ;;
esac
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Adds stub interpreters; commands go to NOTES in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(interpreters.sys, "executable", str(tmp_path / "bin" / "own"))
    monkeypatch.setattr(interpreters, "PYTHONS", ("3.98", "3.99"))

    def add(path: str, version: str, tests: int = 0) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STUB.format(version, file, tests))
        file.chmod(0o755)
        return file

    return add


def test_tests_run_where_an_interpreter_is_found_with_the_pins_of_make(place, capfd, tmp_path):
    own = place("bin/python3.98", "3.98")
    (tmp_path / "bin" / "uv").symlink_to(own)
    assert interpreters.main("cpu", "--constraint", "requirements/cpu.txt") == 0
    said = capfd.readouterr().out
    assert "Python 3.99: not found, so the tests did not run on it" in said
    assert "Python 3.98: the quick tests passed" in said
    _, made, installed, tested = (tmp_path / "NOTES").read_text().splitlines()
    assert f"--python {own} .venv/pythons/3.98" in made
    assert "--constraint requirements/cpu.txt --editable .[cpu,test]" in installed
    assert tested.startswith("3.98 -m pytest")
    assert tested.endswith("-m not model and not process")


def test_failing_tests_and_environments_are_counted(place, capfd, tmp_path):
    place("bin/python3.98", "3.98", tests=1)
    (tmp_path / "bin" / "uv").symlink_to(tmp_path / "bin" / "python3.98")
    assert interpreters.main("cpu") == 1
    assert "Python 3.98: the quick tests failed" in capfd.readouterr().out
    (tmp_path / "bin" / "uv").unlink()
    (tmp_path / "bin" / "uv").symlink_to("/bin/false")
    assert interpreters.main("cpu") == 1
    assert "error: Python 3.98: its environment cannot be made" in capfd.readouterr().err


def test_an_interpreter_is_one_that_answers_with_its_version(place):
    assert interpreters.find("3.98") == ""
    place("bin/python3.98", "3.97")  # such as a command of pyenv without a version behind it
    assert interpreters.find("3.98") == ""
    behind = place("pyenv/versions/3.98.1/bin/python", "3.98")
    assert interpreters.find("3.98") == str(behind)
