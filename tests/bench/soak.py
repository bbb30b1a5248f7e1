"""Whether memory stays where it is as records grow tenfold: the data stages, each as its command.

    python -m tests.bench.soak --json FILE
    python -m tests.bench.soak --records 100000      # against a tenth of that, for a quick look

Records are synthetic: for Download and Split a record is an image, for Propose (with an engine that
has no model) and BuildMCQ a rollout, 20 an image. Download reads files in class folders, and again
the same files by a table that lists them in no order. Peak memory is that which the manifest gives.
"""

import argparse
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

import data_cards
from tasks.questions.settings import ProposeSettings
from tasks.tables import schemas, shards
from tests.bench import results
from tests.conftest import ENGINE, ROOT, settings_of

STAGES = ("Download", "Download by a table", "Split", "Propose", "BuildMCQ")
ROLLOUTS, PER_SHARD, MARGIN = 20, 5000, 1.25
DISTINCT = 500  # photographs; the rest are hard links to them, read like files of their own
WORDS = {"prompt_style": "brief", "seed": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE"
    )
    parser.add_argument("--folder", type=Path, help="where to work; 1 GB a million records")
    given = parser.parse_args()
    runs = {}
    for records in (given.records // 10, given.records):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            runs[records] = line(Path(folder), records, given.stages)
    few, many = runs.values()
    figures = []
    for stage, (seconds, peak) in many.items():
        figures += [
            _figure(f"{stage}: {given.records:,} records", round(seconds, 1), "-", "s"),
            _figure(f"{stage}: peak memory", round(peak), "-", "MB"),
            _figure(f"{stage}: against a tenth", round(peak / few[stage][1], 2), f"<= {MARGIN}", "x"),
            _figure(
                f"{stage}: bytes a further record",
                round((peak - few[stage][1]) * 2**20 / (0.9 * given.records)), "-", "bytes",
            ),
        ]  # fmt: skip
    for figure in figures:
        print(f"{figure['figure']:40} {figure['value']:>12,} {figure['unit']:6} {figure['goal']}")
    results.write(given.json, figures, {"records": given.records})


def line(folder: Path, records: int, stages: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Seconds and peak MB of each of `stages` on so many records."""
    text = (ROOT / "data_cards" / "beetles.md").read_text()
    (folder / "cards").mkdir()
    (folder / "cards" / "soak.md").write_text(text)
    for name, path in (("files", "photos"), ("table", "photos/list.csv")):
        source = f"source: {{kind: folder, path: {folder / path}}}\nclasses:"
        told, replaced = re.subn(r"source:\n.*?\nclasses:", source, text, count=1, flags=re.DOTALL)
        assert replaced, "the card has another source than it had"
        (folder / "cards" / f"{name}.md").write_text(told)
    os.chdir(folder)
    card = data_cards.load("soak")
    images = records // ROLLOUTS
    if {"Download", "Download by a table"} & set(stages):
        write_photographs(folder / "photos", card, records)
    if "Split" in stages:
        write_images(folder / "many", card, records, base_only=False)
    if {"Propose", "BuildMCQ"} & set(stages):
        write_images(folder / "download", card, images, base_only=True)
        write_split(folder / "split", card, images)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "Download": lambda: _run("tasks.download", folder / "f", card="files", max_reject_share=0.0),
        "Download by a table": lambda: _run(
            "tasks.download", folder / "t", card="table", max_reject_share=0.0
        ),
        "Split": lambda: _run(
            "tasks.split", folder / "s", card="soak", download="many", protocol="base_to_novel",
            test_share=0.2, val_share=0.1, pretrain_share=0.1, seed=0,
        ),
        "Propose": lambda: _run(
            "tasks.propose", folder / "p", card="soak", download="download", split="split",
            policy="none", engine=ENGINE.values(), seed=0, **settings_of(
                ProposeSettings, num_rollouts=ROLLOUTS, shard_size=500, max_unparsed_share=1.0,
                fail_fast_unparsed_share=1.0, max_lost_share=0.0,
            ).values(),
        ),
        "BuildMCQ": lambda: _run(
            "tasks.build_mcq", folder / "m", card="soak", download="download", split="split",
            propose="p", num_options=5, min_options=3, top_up="confusion", vocabulary="closed",
            fuzzy_threshold=0.0, fuzzy_margin=5.0, options_from="policy", answer_from="label",
            min_truth_votes=0, max_unparsed_per_image=1.0, max_lost_share=1.0, shard_size=500, **WORDS,
        ),
    }  # fmt: skip
    if "BuildMCQ" in stages and "Propose" not in stages:
        sys.exit("BuildMCQ reads what Propose writes: name both")
    told = {stage: runs[stage]() for stage in STAGES if stage in stages}
    os.chdir(ROOT)
    return told


def write_photographs(folder: Path, card: data_cards.Card, count: int) -> None:
    """`count` tiny PNGs in class folders, most of them hard links, and a shuffled list of them."""
    distinct = folder / ".distinct"
    distinct.mkdir(parents=True)
    for number in range(DISTINCT):
        colour = (number % 256, number // 256, 7)
        Image.new("RGB", (4, 4), colour).save(distinct / f"{number}.png")
    for name in card.classes:
        (folder / name).mkdir()
    listed = []
    for number in range(count):
        name = card.classes[number % len(card.classes)]
        path = f"{name}/{number:07d}.png"
        os.link(distinct / f"{number % DISTINCT}.png", folder / path)
        listed.append(f"{path},{name}\n")
    random.Random(0).shuffle(listed)
    (folder / "list.csv").write_text("path,class\n" + "".join(listed))


def write_images(folder: Path, card: data_cards.Card, count: int, base_only: bool) -> None:
    """A Download artifact of `count` tiny pictures, no two alike by their fingerprints."""
    folder.mkdir()
    classes = len(card.classes) // (2 if base_only else 1)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    schema = schemas.images(card.classes)
    for index, numbers in enumerate(shards.chunks(list(range(count)), PER_SHARD)):
        rows = [
            {
                "image_id": _image_id(card, n, classes),
                "image": {"bytes": buffer.getvalue() + n.to_bytes(4, "big"), "path": None},
                "sha256": f"{n:064x}",
                "pixels": f"{n:032x}",
                "dhash": n,
                "width": 4,
                "height": 4,
                "label": n % classes,
                "official_split": "",
            }
            for n in numbers
        ]
        shards.write(shards.shard_path(folder, "images", index), rows, schema)


def write_split(folder: Path, card: data_cards.Card, count: int) -> None:
    """A Split artifact in which all images are for training."""
    folder.mkdir()
    classes = len(card.classes) // 2
    rows = {
        "image_id": [_image_id(card, n, classes) for n in range(count)],
        "label": [n % classes for n in range(count)],
        "class_name": [card.classes[n % classes] for n in range(count)],
        "group": ["base"] * count,
        "split": ["train"] * count,
    }
    shards.write(folder / "split.parquet", pa.table(rows), schemas.split(card.classes))


def _image_id(card: data_cards.Card, number: int, classes: int) -> str:
    return f"soak/train/{card.classes[number % classes]}/{number:07d}.png"


def _run(module: str, output: Path, **arguments: Any) -> tuple[float, float]:
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


def _figure(name: str, value: float, goal: str, unit: str) -> dict[str, Any]:
    return {"figure": name, "value": value, "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
