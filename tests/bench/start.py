"""Where the seconds of Propose, Evaluate and Train go before their first shard or step.

    python -m tests.bench.start --json FILE
    python -m tests.bench.start --against CHECKOUT      # another version of the code, in turns

Download, Split, BasePolicy, Propose and BuildMCQ are run once as luigi.cfg has them, but for few images
(or taken from `--artifacts`). Then each measured stage runs as the pipeline runs it, in a fresh folder,
`--repeats` times, on a few images, and its processes note when they reach each mark. Medians are
printed: seconds since the stage's process started, and processor seconds (user and system) of all of its
processes up to there. An engine counts up to the moment at which it reached the mark, and a process that
has no such mark, such as the one that hands out shards, up to that of the last engine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.conftest import ROOT

# Marks in the order in which a stage reaches them: a name, the function at whose first call it is set,
# and whether it is set before or after that call.
ENGINES = [
    ("first process: our imports", "tasks.runtime.command:main", "before"),
    ("engines: our imports", "tasks.engines.pool:_serve", "before"),
    ("engines: processor loaded", "tasks.engines.base:PromptBuilder.__init__", "after"),
    ("engines: vLLM imported", "vllm.entrypoints.llm:LLM.__init__", "before"),
    ("engines: weights loaded", "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model", "after"),
    ("engines: engine made", "vllm.entrypoints.llm:LLM.__init__", "after"),
    ("engines: first answer, the first shard begins", "tasks.engines.worker:Worker.check", "after"),
    ("engines: first shard on disk", "tasks.tables.shards:write", "after"),
]  # fmt: skip
TRAIN = [
    ("imports", "tasks.runtime.command:main", "before"),
    ("questions read", "training.loop.session:Session.rows", "after"),
    ("weights loaded", "training.loop.session:Session.model", "after"),
    ("trainer made", "training.loop.session:Session.train", "before"),
    ("the first step begins", "training.loop.log:Recorder.on_train_begin", "after"),
    ("first step", "training.loop.log:Recorder.on_step_end", "after"),
]
# Each stage's module, its marks, and the settings with which it has work for two engines, or one step.
STAGES: dict[str, tuple[str, list[tuple[str, str, str]], dict[str, Any]]] = {
    "Propose": ("tasks.propose", ENGINES, {"limit": 16, "shard_size": 8}),
    "Evaluate": ("tasks.evaluate", ENGINES, {"limit": 8, "shard_size": 8, "modes": "one_step"}),
    "Train": ("training.grpo", TRAIN, {"steps": 1, "watch_every": 0, "save_steps": 1}),
}
OVERLAY = """
[run]
artifacts = {artifacts}
[Split]
train_caps = {{"beetles": 80}}
[Train]
steps = 1
watch_every = 0
[Evaluate]
limit = 8
modes = one_step
"""
# Every Python process of a stage imports this as it starts. It wraps the functions of the marks.
HOOK = """
import functools, importlib.util, json, os, sys, time
marks, file = json.loads(os.environ["BENCH_MARKS"]), os.environ["BENCH_FILE"]
tick = os.sysconf("SC_CLK_TCK")

def spent():
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == os.getsid(0):
            found[pid] = sum(map(int, fields[11:15])) / tick
    return found

def note(name, noted=set()):
    if (os.getpid(), name) not in noted:
        noted.add((os.getpid(), name))
        row = {"pid": str(os.getpid()), "mark": name, "at": time.monotonic(), "spent": spent()}
        with open(file, "a") as out:
            out.write(json.dumps(row) + chr(10))

def wrap(owner, path, name, when):
    *parents, last = path.split(".")
    for each in parents:
        owner = getattr(owner, each)
    function = getattr(owner, last)

    @functools.wraps(function)
    def marked(*args, **kwargs):
        if when == "before":
            note(name)
        try:
            return function(*args, **kwargs)
        finally:
            if when == "after":
                note(name)

    setattr(owner, last, marked)

class Finder:
    @classmethod
    def find_spec(cls, name, path, target=None):
        wanted = [m for m in marks if m[1].split(":")[0] == name]
        if not wanted:
            return None
        sys.meta_path.remove(cls)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for mark, function, when in wanted:
                wrap(module, function.split(":")[1], mark, when)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder)
"""


def main() -> None:
    """Measure the stages in turns, print one table, write the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are quoted")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another one, in turns")
    parser.add_argument("--artifacts", type=Path, help="a run's, with the inputs of the stages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    given = parser.parse_args()
    checkouts = {"this": ROOT} | ({"against": given.against.resolve()} if given.against else {})
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "hook").mkdir()
        (folder / "hook/sitecustomize.py").write_text(HOOK)
        artifacts = given.artifacts or made(folder / "artifacts")
        for stage in given.stages:
            runs: dict[str, list[dict[str, tuple[float, float]]]] = {c: [] for c in checkouts}
            for _ in range(given.repeats):
                for checkout, found in runs.items():
                    found.append(measure(stage, checkouts[checkout], artifacts, folder))
            figures += table(stage, runs)
    results.write(given.json, figures, {name: str(value) for name, value in vars(given).items()})


def made(artifacts: Path) -> Path:
    """A folder of artifacts with the inputs of all stages, and one artifact of each measured stage."""
    overlay = artifacts.with_suffix(".cfg")
    overlay.write_text(OVERLAY.format(artifacts=artifacts))
    for stage in ("Evaluate", "Train"):
        subprocess.run(
            [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", stage],
            cwd=ROOT, check=True, env={**os.environ, "RECIPE": str(overlay)},
        )  # fmt: skip
    return artifacts


def measure(
    stage: str, checkout: Path, artifacts: Path, folder: Path
) -> dict[str, tuple[float, float]]:
    """Run a stage of a checkout; seconds and processor seconds up to each mark."""
    module, marks, few = STAGES[stage]
    recipe = next(
        path
        for path in sorted(artifacts.rglob("recipe.json"))
        if path.parents[1].name == stage.lower() and "round0" in path.parts
    )
    values = json.loads(recipe.read_text()) | few
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    moved = json.dumps({**values, "output": str(output)})
    (output / "recipe.json").write_text(moved)
    noted = folder / "noted"
    noted.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{folder / 'hook'}{os.pathsep}{checkout}",
        "BENCH_MARKS": json.dumps(marks),
        "BENCH_FILE": str(noted),
    }
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", module, str(output / "recipe.json")],
        cwd=checkout, env=environment, check=True, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    rows = [json.loads(line) for line in noted.read_text().splitlines()]
    return dict(reached(rows, [mark for mark, _, _ in marks], began))


def reached(
    rows: list[dict[str, Any]], marks: list[str], began: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each mark with the seconds and the processor seconds up to it."""
    for mark in marks:
        at = {row["pid"]: row for row in rows if row["mark"] == mark}
        if mark.startswith("engines"):
            engines = {row["pid"] for row in rows if row["mark"] == ENGINES[1][0]}
            at = {pid: row for pid, row in at.items() if pid in engines}
        first = "first shard" in mark and "begins" not in mark
        last = (min if first else max)(at.values(), key=lambda row: row["at"])
        own = {} if first else {pid: row["spent"][pid] for pid, row in at.items()}
        yield mark, (last["at"] - began, sum((last["spent"] | own).values()))


def table(
    stage: str, runs: dict[str, list[dict[str, tuple[float, float]]]]
) -> list[dict[str, Any]]:
    """Print a stage's medians; returns them as figures."""
    figures = []
    heads = [f"{what} ({checkout})" for checkout in runs for what in ("s", "processor s")]
    print(f"\n{stage:50}" + "".join(f"{head:>24}" for head in heads))
    for mark in next(iter(runs.values()))[0]:
        row = []
        for checkout, done in runs.items():
            for place, what in enumerate(("s", "processor s")):
                value = statistics.median(found[mark][place] for found in done)
                row.append(value)
                figures.append(
                    {
                        "figure": f"{stage}, {mark}, {checkout}",
                        "value": value,
                        "goal": None,
                        "unit": what,
                    }
                )
        print(f"{mark:50}" + "".join(f"{value:24.2f}" for value in row), flush=True)
    return figures


if __name__ == "__main__":
    main()
