"""`make pythons` runs the quick tests on the other Pythons that it finds, and names those it did not."""

from pathlib import Path

import pytest

from tests import interpreters

# Stands for an interpreter of version {0}, which also makes environments, as uv does.
STUB = """#!/bin/sh
echo "{0} $*" >>NOTES
case "$1" in
-c) echo {0} ;;
pip) {3} ;;
venv) for last; do :; done; mkdir -p $last/bin; cp {1} $last/bin/python ;;
-m) echo "bytecode ${{PYTHONDONTWRITEBYTECODE:-kept}}" >>NOTES; exit {2} ;;
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

    def add(path: str, version: str, tests: int = 0, install: str = "true") -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STUB.format(version, file, tests, install))
        file.chmod(0o755)
        return file

    return add


def test_tests_run_where_an_interpreter_is_found_with_the_pins_of_make(
    place, capfd, tmp_path, monkeypatch
):
    own = place("bin/python3.98", "3.98")
    (tmp_path / "bin" / "uv").symlink_to(own)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    left = tmp_path / ".venv" / "pythons" / "3.98" / "of_other_pins"
    left.mkdir(parents=True)
    assert interpreters.main("cpu", "--constraint", "requirements/cpu.txt") == 0
    said = capfd.readouterr().out
    assert "Python 3.99: not found, so the tests did not run on it" in said
    assert "Python 3.98: the quick tests passed" in said
    assert not left.parent.exists(), "nothing of it is left on the disk"
    _, made, installed, tested, bytecode = (tmp_path / "NOTES").read_text().splitlines()
    assert bytecode == "bytecode kept", "or each process compiles all packages again"
    assert f"--python {own} .venv/pythons/3.98" in made
    assert "--constraint requirements/cpu.txt --editable .[cpu,test]" in installed
    assert tested.startswith("3.98 -m pytest")
    assert tested.endswith("-m not model and not process")


def test_failing_tests_and_environments_are_counted(place, capfd, tmp_path):
    place("bin/python3.98", "3.98", tests=1)
    (tmp_path / "bin" / "uv").symlink_to(tmp_path / "bin" / "python3.98")
    assert interpreters.main("cpu") == 1
    assert "Python 3.98: the quick tests failed" in (said := capfd.readouterr().out)
    assert ".venv/pythons/3.98 is kept" in said
    (tmp_path / "bin" / "uv").unlink()
    (tmp_path / "bin" / "uv").symlink_to("/bin/false")
    assert interpreters.main("cpu") == 1
    assert "error: Python 3.98: its environment cannot be made" in capfd.readouterr().err
    (tmp_path / "bin" / "uv").unlink()
    assert interpreters.main("cpu") == 1
    assert "uv is missing, which installs the packages; run: make" in capfd.readouterr().err


def test_an_installation_or_tests_that_hang_come_to_an_end(place, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(interpreters, "LIMIT", 0.5)
    place("bin/python3.98", "3.98", install="exec sleep 60")
    (tmp_path / "bin" / "uv").symlink_to(tmp_path / "bin" / "python3.98")
    assert interpreters.main("cpu") == 1
    assert "its environment cannot be made" in capfd.readouterr().err
    place("bin/python3.98", "3.98", tests="0$(sleep 60)")
    assert interpreters.main("cpu") == 1
    assert "the quick tests came to no end in" in capfd.readouterr().out


def test_an_interpreter_is_one_that_answers_with_its_version(place):
    assert interpreters.find("3.98") == ""
    place("bin/python3.98", "3.97")  # such as a command of pyenv without a version behind it
    assert interpreters.find("3.98") == ""
    behind = place("pyenv/versions/3.98.1/bin/python", "3.98")
    assert interpreters.find("3.98") == str(behind)


def test_a_version_for_which_no_time_is_left_is_named(place, capfd, tmp_path, monkeypatch):
    (tmp_path / "bin" / "uv").symlink_to(place("bin/python3.98", "3.98"))
    place("bin/python3.99", "3.99")
    monkeypatch.setenv("SECONDS_LEFT", "239")
    assert interpreters.main("cpu") == 0
    said = capfd.readouterr().out
    assert "Python 3.98: found, but its tests take longer than the 239 s that are left" in said
    assert "passed" not in said
    monkeypatch.setenv("SECONDS_LEFT", "241")
    assert interpreters.main("cpu") == 0
    assert capfd.readouterr().out.count("the quick tests passed") == 2
