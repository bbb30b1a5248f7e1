"""Runs the quick tests on the other Python versions that this machine has.

    python -m tests.interpreters cpu --override requirements/overrides.txt --constraint requirements/cpu.txt

`make pythons` runs it, with the very arguments that the Makefile installs with. Each interpreter gets an
environment of its own in `.venv/pythons`, made anew of the same pinned versions, and deleted when its tests
pass. uv's cache holds what the first environment downloaded, except the wheels that are built for one Python.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.pins import PYTHONS

LIMIT = 900  # seconds for an installation, and for the tests
NEEDED = 240.0  # seconds that one version takes, installation included, until one was timed
FOLDER = Path(".venv") / "pythons"
QUICK = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-n",
    "2",
    "--dist",
    "loadfile",
    "--max-worker-restart",
    "0",
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
    if not Path(uv).exists():
        print(f"error: {uv} is missing, which installs the packages; run: make", file=sys.stderr)
        return False
    needed = ["--editable", f".[{build},test]"]
    print(f"Python {version}: installing the pinned packages into {environment}", flush=True)
    started = time.monotonic()
    shutil.rmtree(environment, ignore_errors=True)  # it may be half-made, or of other pins
    for command in (
        [uv, "venv", "--quiet", "--python", interpreter, str(environment)],
        [uv, "pip", "install", "--quiet", "--python", str(environment), *arguments, *needed],
    ):
        if _ended(command):
            print(f"error: Python {version}: its environment cannot be made", file=sys.stderr)
            return False
    installed = time.monotonic()
    print(
        f"Python {version}: installed in {installed - started:.0f} s; the quick tests", flush=True
    )
    python = str(environment / "bin" / "python")
    # Each process that a test starts would compile all packages again where bytecode is not kept.
    kept = {
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(environment.resolve() / "bytecode"),
    }
    variables = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **kept}
    failed = _ended([python, "-m", "pytest", *QUICK], variables)
    seconds = f"{time.monotonic() - installed:.0f} s"
    if failed:
        print(
            f"Python {version}: the quick tests {failed} in {seconds}; {environment} is kept",
            flush=True,
        )
        return False
    print(f"Python {version}: the quick tests passed in {seconds}", flush=True)
    shutil.rmtree(environment)
    return True


def _ended(command: list[str], variables: dict[str, str] | None = None) -> str:
    """Run a command for LIMIT seconds at most; "" where it ends well, or else how it does not."""
    try:
        done = subprocess.run(command, env={**os.environ, **(variables or {})}, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "came to no end"
    return "failed" if done.returncode else ""


def main(build: str, *arguments: str) -> int:
    """The number of versions whose quick tests fail.

    Versions that are not found are named, and those for which SECONDS_LEFT, if set, do not suffice.
    """
    own = "{}.{}".format(*sys.version_info)
    others = {version: find(version) for version in PYTHONS if version != own}
    for version in (version for version, interpreter in others.items() if not interpreter):
        print(f"Python {version}: not found, so the tests did not run on it", flush=True)
    end = time.monotonic() + float(os.environ.get("SECONDS_LEFT", "inf"))  # of .ci/run
    failures, needed = 0, NEEDED
    for version, interpreter in others.items():
        started = time.monotonic()
        if interpreter and started + needed > end:
            print(
                f"Python {version}: found, but its tests take longer than the {end - started:.0f} s that "
                "are left; run: make pythons",
                flush=True,
            )
        elif interpreter:
            failures += not check(version, interpreter, build, list(arguments))
            needed = time.monotonic() - started
    return failures


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
