"""Whether a constraints file has a solution on every Python and processor, all of it pinned.

    python -m tests.pins cuda --override requirements/overrides.txt --constraint requirements/cuda.txt

`make lint` runs it for both builds, with the very arguments that the Makefile installs with. Nothing
is installed or downloaded but the index's own pages, and these come from uv's cache where it has them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13")
# The oldest C library that every wheel has a build for, by processor.
PLATFORMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_34")
NO_SOLUTION = 1  # uv's exit code where it understood everything; 2 for any other failure


def resolve(build: str, arguments: list[str], python: str, platform: str) -> str:
    """What is wrong with a build's constraints on one Python and platform, as a sentence; else "".

    `arguments` are those of `uv pip install`: its override and constraint files.
    """
    constraints = arguments[arguments.index("--constraint") + 1]
    command = [
        *(
            str(Path(sys.executable).with_name("uv")),
            "pip",
            "compile",
            "pyproject.toml",
            *arguments,
        ),
        *("--extra", build, "--extra", "test", "--python-version", python),
        *("--python-platform", platform, "--no-python-downloads"),
        *("--quiet", "--no-header", "--no-annotate"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    where = f"{constraints}, Python {python}, {platform}"
    if done.returncode == NO_SOLUTION:
        return f"{where}: no solution\n{done.stderr.strip()}"
    if done.returncode:
        return f"{where}: not checked, the package index cannot be read\n{done.stderr.strip()}"
    pinned = {line.strip().lower() for line in Path(constraints).read_text().splitlines()}
    loose = [line for line in done.stdout.split() if line.lower() not in pinned]
    return f"{where}: not pinned: {', '.join(loose)}; add it to the file" if loose else ""


def main(build: str, *arguments: str) -> int:
    """Print what is wrong; the number of Pythons and platforms with something wrong."""
    kinds = list(product(PYTHONS, PLATFORMS))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda kind: resolve(build, list(arguments), *kind), kinds)
    wrong = [each for each in found if each]
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    if not wrong:
        print(
            f"{build}: solved and pinned on Python {', '.join(PYTHONS)}, {' and '.join(PLATFORMS)}"
        )
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
