"""Runs a trial of a run: its real stages and models on this machine, with ten images and two steps.

Propose, BuildMCQ, Train and Evaluate run as in the real run, but on ten images, or on one a class if
that is more. Train is stopped after its first checkpoint, and resumed. For each stage the trial
reports seconds, tokens a second, the peak memory of the process and, with `nvidia-smi`, the memory of
the GPUs. When all stages succeed, the trial deletes its artifacts. Download and BasePolicy are those
of the real run.
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
from pipeline.artifacts import child, store
from pipeline.cli.rehearse import MEND, READY, Point
from pipeline.settings import overlays
from pipeline.stage import Stage
from tasks.tables import shards
from tasks.tables.split_table import base_count

IMAGES = 10
POLL = 0.2  # seconds
FAILED = re.compile(r"\w+ (failed: |was killed by ).*")  # the error sentence of a stage


def overlay(dataset: str, uses: int, watched: bool) -> str:
    """The overlay of a trial. It sets the sections of the dataset and of its sets, which override all others.

    `uses` is the number of optimiser steps on a batch of completions: a checkpoint can only be
    written after the last of them. `watched` is whether the run validates during training.
    """
    whole = "+".join(sorted(dataset.split("+")))
    lost = "max_lost_share = 1\n"
    unparsed = "max_unparsed_share = 1\nfail_fast_unparsed_share = 1\n"
    of_each = {
        "Propose": lost + unparsed,
        "BuildMCQ": lost,
        "Evaluate": f"limit = {IMAGES // 2}\n",
    }
    names = dataset.split("+")
    sections = {f"Split:{name}": _caps(name) for name in names} | {
        f"{stage}:{name}": keys for stage, keys in of_each.items() for name in names
    }
    sections[f"Train:{whole}"] = (
        f"steps = {2 * uses}\nepochs = 0\nsave_steps = {uses}\nreport_to =\npush_to_hub =\n"
        f"watch_every = {2 * uses if watched else 0}\nwatch_images = {IMAGES}\n"
    )
    return "".join(f"[{section}]\n{keys}" for section, keys in sections.items())


def _caps(name: str) -> str:
    """The cap on a set's train images: IMAGES, or one a class if that is more, as Split demands."""
    classes = base_count(len(data_cards.load(name).classes), tasks.Split(dataset=name).protocol)
    return f"train_caps = {json.dumps({'*': max(IMAGES, classes)})}\n"


def trial(dataset: str, method: str, seed: int) -> Iterator[Point]:
    """Run the stages of round 0, with a point for each, up to the first that fails."""
    of_round = {"dataset": dataset, "method": method, "seed": seed, "refresh_round": 0}
    train: Any = tasks.Train(**of_round)
    uses = max(1, int(train.settings.trl.get("num_iterations", 1)))
    with tempfile.TemporaryDirectory(prefix="dive-trial-") as folder:
        file = Path(folder) / "trial.cfg"
        file.write_text(overlay(dataset, uses, bool(train.settings.watch_every)), encoding="utf-8")
        os.environ["RECIPE"] = ",".join([*overlays(), str(file)])
        Register.clear_instance_cache()
        train = tasks.Train(**of_round)
        evaluate = tasks.Evaluate(subset="", **of_round)
        asked = [stage for stage in train.requires() if isinstance(stage, tasks.BuildMCQ)]
        splits = [tasks.Split(dataset=name, seed=seed) for name in train.names]
        finished: list[Stage] = list(splits)
        with _links_kept(train, *splits):
            for stage in [*_proposals(asked), *asked, train, *(evaluate.parts() or [evaluate])]:
                finished.append(stage)
                yield (point := _stage(stage))
                if point.state == MEND:
                    return
            for stage in finished:
                store.remove(stage.folder)


def _proposals(asked: list[Any]) -> list[Stage]:
    """The Propose of each BuildMCQ, also for methods that train on the open question."""
    return [
        stage.needed.get("propose") or tasks.Propose(subset=stage.subset, **tasks.graph(stage))
        for stage in asked
    ]


def _stage(stage: Any) -> Point:
    """Run one stage. Train is stopped after its first checkpoint, and resumed."""
    what = f"trial: {stage.task_family}"
    flags = [
        part
        for name in ("dataset", "method", "refresh_round", "seed", "subset")
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
            lines = log.read().decode("utf-8", "replace").strip().splitlines()
            errors = [match[0] for line in lines if (match := FAILED.search(line))]
            return Point(what, MEND, (errors or [child.last_words(lines) or "it said nothing"])[-1])
    resumed = ", stopped and resumed" if stopped else ""
    return Point(what, READY, f"{_usage(stage.folder, gpu)}{resumed}")


def _usage(folder: Path, gpu: float) -> str:
    """A stage's time, memory and throughput, from its manifest and from the log of Train."""
    manifest = store.read_manifest(folder)
    stats = manifest.get("stats") or {}
    parts = [
        f"{manifest['seconds']:.0f} s",
        f"{manifest['peak_memory_mb'] / 1024:.1f} GiB of memory",
    ]
    if gpu:
        parts.append(f"{gpu:.1f} GiB of the GPUs'")
    if stats.get("seconds") and stats.get("tokens"):
        parts.append(f"{stats['tokens'] / stats['seconds']:,.0f} tokens a second")
    if (log := folder / "train_log.parquet").exists():
        rates = [rate for rate in shards.read_file(log)["tokens_per_second"].to_pylist() if rate]
        parts += [f"{max(rates):,.0f} tokens a second"] if rates else []
    return ", ".join(parts)


def gpu_memory() -> float:
    """The GiB in use on all GPUs together, as `nvidia-smi` reports them; 0 without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return 0.0
    query = [command, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        process = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return sum(float(line) for line in process.stdout.split()) / 1024
    return 0.0


@contextlib.contextmanager
def _links_kept(*stages: Any) -> Iterator[None]:
    """Restore the links `current` after the trial."""
    roots = {Path(stage.folder).parents[len(Path(stage.place()).parts)] for stage in stages}

    def links() -> set[Path]:
        # With a plain name rglob leaves out broken links, but not with a pattern.
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
