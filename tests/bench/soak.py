"""The data stages on many pictures, one after the other: rows, memory, and Propose's wall time over busy.

    python -m tests.bench.soak --json FILE
    python -m tests.bench.soak --records 20000       # against a tenth of that, for a quick look
    python -m tests.bench.soak --workers 0           # Propose in one process, without Ray

Download reads small JPEGs in class folders, and again the same files by a table that lists them in no
order; Split, Propose and BuildMCQ read what the stage before wrote. Propose asks an engine that has
no model and takes a fixed time a shard, on two workers of Ray. Each stage is its command. Peak
memory is that of the stage with all of its descendants, as the manifest gives it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.ingest.settings import DownloadSettings, SplitSettings
from tasks.language.prompts import LETTERS
from tasks.propose import propose
from tasks.questions.settings import BuildMCQSettings, ProposeSettings
from tasks.runtime.command import main as stage_main
from tasks.tables import shards
from tests.bench import results, synthetic
from tests.conftest import ENGINE, ROOT, settings_of

STAGES = ("Download", "Download by a table", "Split", "Propose", "BuildMCQ")
ROLLOUTS, MARGIN = 4, 1.25
ENGINE_NAME = "tests.bench.synthetic:engine"
OWN = "tests.bench.soak"  # Propose with the engine below on Ray


def main() -> None:
    """Run the stages on a tenth of the records and on all; print and write the figures."""
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return propose_on_ray()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--records", type=int, default=1_000_000, help="pictures, 20,000 or more")
    parser.add_argument("--workers", type=int, default=2, help="of Ray; 0: no Ray")
    parser.add_argument("--folder", type=Path, help="where to work; some GB a million records")
    given = parser.parse_args()
    runs = {}
    for records in (given.records // 10, given.records):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            runs[records] = line(Path(folder), records, given.workers)
    few, many = runs.values()
    figures = []
    for stage, (seconds, peak) in many["stages"].items():
        before = few["stages"][stage][1]
        figures += [
            _figure(f"{stage}: seconds", round(seconds, 1), "-", "s"),
            _figure(f"{stage}: peak memory", round(peak), "-", "MB"),
            _figure(f"{stage}: against a tenth", round(peak / before, 2), f"<= {MARGIN}", "x"),
            _figure(f"{stage}: bytes a further record",
                    round((peak - before) * 2**20 / (0.9 * given.records)), "-", "bytes"),
        ]  # fmt: skip
    figures += [
        _figure("Propose: images", many["asked"], "-", "images"),
        _figure("Propose: wall over busy, a tenth", round(few["wall over busy"], 3), "-", "x"),
        _figure("Propose: wall over busy", round(many["wall over busy"], 3), "-", "x"),
        _figure("rows that are missing, doubled or wrong", many["wrong"] + few["wrong"], "0", "rows"),
    ]  # fmt: skip
    for figure in figures:
        print(f"{figure['figure']:42} {figure['value']:>12,} {figure['unit']:6} {figure['goal']}")
    results.write(given.json, figures, {"records": given.records, "workers": given.workers})


def line(folder: Path, records: int, workers: int) -> dict[str, Any]:
    """Seconds and peak MB of each stage, Propose's wall time over busy, and the number of wrong rows."""
    os.chdir(folder)
    synthetic.write_photographs(folder / "photos", records)
    on = {"card": "bench", "download": "download", "split": "split", "seed": 0}
    engine = settings_of(type(ENGINE), backend=ENGINE_NAME, processes=workers).values()
    read = {"card": "bench", **settings_of(DownloadSettings, max_reject_share=0.0).values()}
    asked = settings_of(ProposeSettings, num_rollouts=ROLLOUTS).values()
    built = settings_of(BuildMCQSettings, max_unparsed_per_image=1.0, max_lost_share=1.0).values()
    words = {"prompt_style": "brief"}
    split = settings_of(SplitSettings, protocol="all", pretrain_share=0.0).values()
    stages: dict[str, tuple[str, str, dict[str, Any]]] = {
        "Download by a table": ("tasks.download", "table", read),
        "Download": ("tasks.download", "download", read),
        "Split": ("tasks.split", "split", {"card": "bench", "download": "download", "seed": 0, **split}),
        "Propose": (OWN if workers else "tasks.propose", "propose",
                    {**on, "policy": "none", "engine": engine, **asked}),
        "BuildMCQ": ("tasks.build_mcq", "mcq", {**on, **words, "propose": "propose", **built}),
    }  # fmt: skip
    done = {}
    for stage, (module, output, arguments) in stages.items():
        listed = "photos/list.csv" if output == "table" else "photos"
        synthetic.write_card(folder, folder / listed)
        done[stage] = run_stage(module, folder / output, **arguments)
        print(f"{records:,} records: {stage} {done[stage][0]:.1f} s, {done[stage][1]:.0f} MB",
              file=sys.stderr)  # fmt: skip
    stats = json.loads((folder / "propose" / "stats.json").read_text())
    wall = stats["seconds"] * stats["engines"] / max(stats["busy_seconds"], 0.1)
    wrong = wrong_rows(folder, records)
    os.chdir(ROOT)
    told = {stage: done[stage] for stage in STAGES}
    return {"stages": told, "wall over busy": wall, "wrong": wrong, "asked": stats["images"]}


def wrong_rows(folder: Path, records: int) -> int:
    """How many rows are missing, doubled, out of order, or not those of their image."""
    names = synthetic.card().classes
    wrong = 0
    for output in ("download", "table"):
        ids = [row["image_id"] for row in shards.iter_rows(folder / output, "images", ["image_id"])]
        wrong += abs(records - len(ids)) + len(ids) - len(set(ids))
    labels = {}
    for row in shards.iter_rows(folder / "split", "split", ["image_id", "label", "split"]):
        wrong += names[row["label"]] != row["image_id"].split("/")[1]
        if row["split"] == "train":
            labels[row["image_id"]] = row["label"]
    columns = ["image_id", "rollout", "completion"]
    answered = shards.iter_rows(folder / "propose", "rollouts", columns)
    for image_id, number in itertools.product(labels, range(ROLLOUTS)):
        row = next(answered, None)
        if (
            row is None
            or (row["image_id"], row["rollout"]) != (image_id, number)
            or not row["completion"].startswith(f"<think>{image_id.split('/')[2]} {number}<")
        ):
            wrong += 1
    wrong += sum(1 for _ in answered)
    candidates = [
        r["image_id"] for r in shards.iter_rows(folder / "mcq", "candidates", ["image_id"])
    ]
    wrong += candidates != list(labels)
    return wrong + sum(_wrong_questions(folder, labels))


def _wrong_questions(folder: Path, labels: dict[str, int]) -> Iterator[bool]:
    """For each question, whether it is a second one of its image, or has another truth."""
    seen = set()
    columns = ["image_id", "option_class_ids", "answer_letter"]
    for row in shards.iter_rows(folder / "mcq", "mcq", columns):
        truth = row["option_class_ids"][LETTERS.index(row["answer_letter"])]
        yield row["image_id"] in seen or truth != labels.get(row["image_id"])
        seen.add(row["image_id"])


def run_stage(module: str, output: Path, **arguments: Any) -> tuple[float, float]:
    """Run a stage's command; returns its seconds and its peak memory in MB."""
    output.mkdir(exist_ok=True)
    config = output.with_suffix(".json")
    config.write_text(json.dumps({"output": str(output), **arguments}))
    started = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-m", module, str(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        sys.exit(f"{module}: {ran.stderr[-3000:]}")
    told = json.loads((output / ".done").read_text())
    return time.monotonic() - started, told["peak_memory_mb"]


def propose_on_ray() -> None:
    """The command of Propose, with the engine without a model on each worker of Ray's pool.

    `[engine] backend = ray` opens vLLM on its workers; here all but that is the real thing.
    """
    from tasks.engines import ray_pool, sampler

    class Workers(ray_pool.RayWorker):
        def __init__(self, policy: Path, settings: Any, probe: Any):
            super().__init__(policy, settings, probe)
            self._worker = ray_pool.Worker(synthetic.LatentEngine)

    ray_pool.RayWorker = Workers  # type: ignore[misc]
    sampler.open_pool = ray_pool.RayPool
    stage_main(propose)


def _figure(name: str, value: float, goal: str, unit: str) -> dict[str, Any]:
    return {"figure": name, "value": value, "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
