"""Runs the quick tests on the other Python versions that this machine has.

    python -m tests.interpreters cpu --override requirements/overrides.txt --constraint requirements/cpu.txt

`make pythons` runs it, with the very arguments that the Makefile installs with. Each interpreter gets an
environment of its own in `.venv/pythons`, made of the same pinned versions. uv's cache holds what the first
environment downloaded, except the wheels that are built for one Python.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.pins import PYTHONS

FOLDER = Path(".venv") / "pythons"
QUICK = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-n",
    "2",
    "--dist",
    "loadfile",
    "-m",
    "not model and not process",
)


def find(version: str) -> str:
    """The path of an interpreter of this version, on PATH or among pyenv's; "" where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    names = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for name in filter(None, names):
        command = [str(name), "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.stdout.strip() == version:  # pyenv's own commands stand for nothing at times
            return str(name)
    return ""


def check(version: str, interpreter: str, build: str, arguments: list[str]) -> bool:
    """Make the environment of one version, and run the quick tests in it; whether they pass."""
    environment = FOLDER / version
    uv = str(Path(sys.executable).with_name("uv"))
    needed = ["--editable", f".[{build},test]"]
    print(f"Python {version}: installing the pinned packages into {environment}", flush=True)
    started = time.monotonic()
    for command in (
        [uv, "venv", "--quiet", "--allow-existing", "--python", interpreter, str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(environment), *arguments, *needed],
    ):
        if subprocess.run(command).returncode:
            print(f"error: Python {version}: its environment cannot be made", file=sys.stderr)
            return False
    installed = time.monotonic()
    print(
        f"Python {version}: installed in {installed - started:.0f} s; the quick tests", flush=True
    )
    python = str(environment / "bin" / "python")
    paths = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, "-m", "pytest", *QUICK], env={**os.environ, **paths})
    outcome = "failed" if done.returncode else "passed"
    print(
        f"Python {version}: the quick tests {outcome} in {time.monotonic() - installed:.0f} s",
        flush=True,
    )
    return not done.returncode


def main(build: str, *arguments: str) -> int:
    """The number of versions whose quick tests fail; versions that are not found are named."""
    own = "{}.{}".format(*sys.version_info)
    others = {version: find(version) for version in PYTHONS if version != own}
    for version in (version for version, interpreter in others.items() if not interpreter):
        print(f"Python {version}: not found, so the tests did not run on it", flush=True)
    found = {version: interpreter for version, interpreter in others.items() if interpreter}
    return sum(not check(*each, build, list(arguments)) for each in found.items())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
