"""`make` looks at the machine before it downloads anything, and at the GPU after."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]
# Stands for Python, uv and all else in .venv/bin: notes its arguments, and fails where told to.
STUB = """#!/bin/sh
echo "$(basename $0) $*" >>"$NOTES"
case "$*" in
"-m venv .venv") mkdir -p .venv/bin; [ -z "$NO_VENV" ] || exit 1; cp "$0" .venv/bin/python; exit ;;
"-m pip --version") exit "${NO_PIP:-0}" ;;
"-m pip install"*) cp "$0" .venv/bin/uv; exit ;;
-c*|"-m tasks.runtime.machine cuda") exec PYTHON "$@" ;;
-V) echo Python 3.10.1; exit ;;
"pip install"*) exit "${NO_NET:-0}" ;;
"-m tasks.runtime.machine torch") exit "${BLIND:-0}" ;;
esac
""".replace('PYTHON "$@"', f'{sys.executable} "$@"')


@pytest.fixture
def make(tmp_path):
    """`make setup` of the CUDA build with stubs; returns exit code, errors and what was called."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("tasks/__init__.py", "tasks/runtime/__init__.py", "tasks/runtime/machine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    stub = tmp_path / "stubs" / "python3"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(**environment: str) -> tuple[int, str, list[str]]:
        notes = tmp_path / "notes"
        notes.write_text("")
        done = subprocess.run(
            ["make", "--no-print-directory", "setup", "DEVICE=cuda"],
            cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": f"{stub.parent}:{os.environ['PATH']}", "NOTES": str(notes),
                 "CC": "sh", "CUDA_VISIBLE_DEVICES": "", **environment},
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, notes.read_text().splitlines()

    run.folder = tmp_path
    return run


def test_the_machine_is_looked_at_first_and_the_gpu_last(make):
    code, said, called = make()
    assert code == 0, said
    kinds = [
        "tasks.runtime.machine cuda",
        "pip install --quiet",
        "uv pip install",
        "tasks.runtime.machine torch",
    ]
    order = [next(i for i, line in enumerate(called) if kind in line) for kind in kinds]
    assert order == sorted(order)
    installed = next(line for line in called if line.startswith("uv pip install"))
    assert "--override requirements/overrides.txt --constraint requirements/cuda.txt" in installed
    assert (make.folder / ".venv" / ".ready-cuda").exists()
    assert make()[2] == [], "once is enough"


def test_nothing_is_downloaded_where_something_is_missing(make):
    code, said, called = make(CC="no-such-compiler")
    assert code != 0
    assert "error: GPU kernels need a C compiler: CC = no-such-compiler is not there" in said
    assert not any("install" in line for line in called)
    assert make()[0] == 0, "mended, it goes on"


def test_an_environment_that_cannot_be_made_is_told_with_what_brings_it_and_leaves_nothing(make):
    code, said, _ = make(NO_VENV="1")
    assert code != 0
    assert re.search(
        r"error: python3 cannot make a virtual .*apt-get install python3\.\d+-venv", said
    )
    assert not (make.folder / ".venv").exists()
    assert make()[0] == 0


def test_an_environment_that_was_cut_off_is_made_anew(make):
    half = make.folder / ".venv" / "bin" / "python"
    half.parent.mkdir(parents=True)
    half.write_text("#!/bin/sh\nexit 1\n")
    half.chmod(0o755)
    assert make()[0] == 0
    assert half.read_text() != "#!/bin/sh\nexit 1\n"


def test_an_installation_that_was_cut_off_goes_on_at_the_next_make(make):
    code, said, called = make(NO_NET="2")
    assert code != 0
    assert "fetching uv" in said
    assert "installing into .venv (cuda): about" in said
    assert (
        "error: not all packages could be installed; what is downloaded is kept: run the same"
        in said
    )
    assert not (make.folder / ".venv" / ".ready-cuda").exists()
    code, said, called = make()
    assert code == 0
    assert not any("-m venv" in line or "-m pip install" in line for line in called), "kept"
    assert "loading torch for the first time" in said


def test_a_gpu_that_torch_does_not_see_is_not_ready(make):
    assert make(BLIND="1")[0] != 0
    assert not (make.folder / ".venv" / ".ready-cuda").exists()
    assert make()[0] == 0


def test_another_python_is_refused_before_anything_is_made(make):
    stub = make.folder / "stubs" / "python3"
    stub.write_text(STUB.replace("-c*|", "-c*) exit 1 ;;\n"))
    code, said, called = make()
    assert code != 0
    assert (
        "error: python3 is Python 3.10.1; name another: make PYTHON=python3.11 (or 3.12, 3.13)"
        in said
    )
    assert not any("venv" in line for line in called)
    assert not (make.folder / ".venv").exists()


def test_lint_resolves_with_the_arguments_of_the_installation(make):
    (make.folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        shutil.copy(make.folder / "stubs" / "python3", make.folder / ".venv" / "bin" / name)
    (make.folder / ".venv" / ".ready-cuda").touch()
    notes = make.folder / "notes"
    subprocess.run(
        ["make", "lint", "DEVICE=cuda"], cwd=make.folder, check=True, capture_output=True,
        env={"PATH": os.environ["PATH"], "NOTES": str(notes)},
    )  # fmt: skip
    checks = [line for line in notes.read_text().splitlines() if "tests.pins" in line]
    assert checks == [
        f"python -m tests.pins {build} --override requirements/overrides.txt "
        f"--constraint requirements/{build}.txt"
        for build in ("cpu", "cuda")
    ]
    assert Path(ROOT / "tests" / "pins.py").exists()
