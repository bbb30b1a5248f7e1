"""A trial of the real run: its own stages, models and machine, on a few images and two steps.

Propose, BuildMCQ, Train and Evaluate run as they will, with ten images, or one a class; Train is stopped after its
first checkpoint and goes on from it. What each stage took is told: seconds, tokens a second, peak
memory of the process and, where `nvidia-smi` is there, of the GPUs. The trial's artifacts are
deleted when all went well; Download and BasePolicy are those of the run itself.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luigi.task_register import Register

import data_cards
from pipeline import tasks
from pipeline.artifacts import store
from pipeline.cli.rehearse import MEND, READY, Point
from pipeline.settings import recipes
from pipeline.stage import Stage
from tasks.tables import shards
from tasks.tables.split_table import base_count

IMAGES = 10
POLL = 0.2
FAILED = re.compile(r"\w+ (failed: |was killed by ).*")  # how a stage's own sentence begins


def overlay(dataset: str, uses: int, watched: bool) -> str:
    """Settings of a trial, for a dataset's own sections, which go before all others.

    `uses` is how many optimiser steps a batch of completions serves: checkpoints fall between them.
    """
    whole = "+".join(sorted(dataset.split("+")))
    lost = "max_lost_share = 1\n"
    read = "max_unparsed_share = 1\nfail_fast_unparsed_share = 1\n"
    sections = {f"Split:{name}": _caps(name) for name in dataset.split("+")} | {
        f"Propose:{whole}": lost + read,
        f"BuildMCQ:{whole}": lost,
        f"Train:{whole}": f"steps = {2 * uses}\nsave_steps = {uses}\nreport_to =\npush_to_hub =\n"
        f"watch_every = {2 * uses if watched else 0}\nwatch_images = {IMAGES}\n",
        f"Evaluate:{whole}": f"limit = {IMAGES // 2}\n",
    }
    return "".join(f"[{section}]\n{keys}" for section, keys in sections.items())


def _caps(name: str) -> str:
    """IMAGES train images of a set, or one a class where that is more, since Split asks for it."""
    classes = base_count(len(data_cards.load(name).classes), tasks.Split(dataset=name).protocol)
    return f"train_caps = {json.dumps({'*': max(IMAGES, classes)})}\n"


def trial(dataset: str, method: str, seed: int) -> Iterator[Point]:
    """Run the stages of round 0 and tell of each. Ends at the first that fails."""
    given = {"dataset": dataset, "method": method, "seed": seed, "refresh_round": 0}
    train: Any = tasks.Train(**given)
    uses = max(1, int(train.settings.trl.get("num_iterations", 1)))
    with tempfile.TemporaryDirectory(prefix="dive-trial-") as folder:
        file = Path(folder) / "trial.cfg"
        file.write_text(overlay(dataset, uses, bool(train.settings.watch_every)), encoding="utf-8")
        os.environ["RECIPE"] = ",".join([*recipes(), str(file)])
        Register.clear_instance_cache()
        train = tasks.Train(**given)
        evaluate = tasks.Evaluate(subset="", **given)
        asked = [stage for stage in train.requires() if isinstance(stage, tasks.BuildMCQ)]
        splits = [tasks.Split(dataset=name, seed=seed) for name in train.names]
        made: list[Stage] = list(splits)
        with _links_kept(train, *splits):
            for stage in [*_proposals(asked), *asked, train, *(evaluate.parts() or [evaluate])]:
                made.append(stage)
                yield (point := _stage(stage))
                if point.state == MEND:
                    return
            for stage in made:
                store.remove(stage.folder)


def _proposals(asked: list[Any]) -> list[Stage]:
    """What the questions rest on; of a method that asks openly, what it would propose."""
    return [
        stage.needed.get("propose") or tasks.Propose(subset=stage.subset, **tasks.graph(stage))
        for stage in asked
    ]


def _stage(stage: Any) -> Point:
    """Run one stage; Train twice, with a stop after its first checkpoint."""
    what = f"trial: {stage.task_family}"
    given = ("dataset", "method", "refresh_round", "seed", "subset")
    flags = [
        part
        for name in given
        if hasattr(stage, name)
        for part in (f"--{name.replace('_', '-')}", str(getattr(stage, name)))
    ]
    command = [
        sys.executable,
        "-m",
        "luigi",
        "--module",
        "pipeline.tasks",
        stage.task_family,
        *flags,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        gpu, stopped = 0.0, False
        checkpoints = store.partial_of(stage.folder) / "checkpoints"
        try:
            while process.poll() is None:
                gpu = max(gpu, gpu_memory())
                if (
                    stage.task_family == "Train"
                    and not stopped
                    and list(checkpoints.glob("*/complete"))
                ):
                    stopped = True
                    process.send_signal(signal.SIGINT)
                time.sleep(POLL)
            if stopped and not stage.folder.is_dir():
                process = subprocess.Popen(command, stdout=log, stderr=log)
                while process.poll() is None:
                    gpu = max(gpu, gpu_memory())
                    time.sleep(POLL)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if not stage.folder.is_dir():
            log.seek(0)
            said = log.read().decode("utf-8", "replace").strip().splitlines()
            wrong = [match[0] for line in said if (match := FAILED.search(line))]
            return Point(what, MEND, (wrong or said or ["it said nothing"])[-1])
    resumed = ", stopped and resumed" if stopped else ""
    return Point(what, READY, f"{_told(stage.folder, gpu)}{resumed}")


def _told(folder: Path, gpu: float) -> str:
    """What a stage took, from its manifest and, of Train, its log."""
    manifest = store.read_manifest(folder)
    stats = manifest.get("stats") or {}
    told = [
        f"{manifest['seconds']:.0f} s",
        f"{manifest['peak_memory_mb'] / 1024:.1f} GiB of memory",
    ]
    if gpu:
        told.append(f"{gpu:.1f} GiB of the GPUs'")
    if stats.get("seconds") and stats.get("tokens"):
        told.append(f"{stats['tokens'] / stats['seconds']:,.0f} tokens a second")
    if (log := folder / "train_log.parquet").exists():
        rates = [rate for rate in shards.read_file(log)["tokens_per_second"].to_pylist() if rate]
        told += [f"{max(rates):,.0f} tokens a second"] if rates else []
    return ", ".join(told)


def gpu_memory() -> float:
    """GiB in use on all GPUs together, as the driver counts them; 0 without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0.0
    query = [command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return sum(float(line) for line in told.stdout.split()) / 1024
    return 0.0


@contextlib.contextmanager
def _links_kept(*stages: Any) -> Iterator[None]:
    """Let the links `current` lead where they led before."""
    roots = {Path(stage.folder).parents[len(Path(stage.place()).parts)] for stage in stages}

    def links() -> set[Path]:
        # As a pattern: of a plain name rglob leaves out links that lead nowhere.
        return {link for root in roots for link in root.rglob("curren[t]")}

    before = {link: os.readlink(link) for link in links()}
    try:
        yield
    finally:
        for link in links():
            if link in before and (link.parent / before[link]).is_dir():
                store.point_at(link.parent / before[link])
            elif not link.exists():
                link.unlink()
