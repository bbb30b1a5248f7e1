"""Images into Parquet: Download beside `datasets`' imagefolder, on the same files, in turns.

    python -m tests.bench.ingest --images 10000 --json ingest.json

Download opens every image, decodes it in full and takes its fingerprints; imagefolder copies bytes
without looking at them. So a third contender reads like imagefolder and then decodes each image
once. Each contender is a process of its own; seconds are of the whole process, start included;
`per core` divides by the processor time it used, on however many cores.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bench import results

CLASSES = 50
DISTINCT = 500  # photographs; the rest are hard links to them, read like files of their own
CONTENDERS = {
    "download": """
import data_cards
from tasks.download import download
data_cards.FOLDER = work
(work / "out").mkdir()
download(work / "out", card="bench", max_reject_share=0.0)
""",
    "imagefolder": """
from datasets import load_dataset
table = load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(work / "cache"))
table.save_to_disk(str(work / "out"))
""",
    "imagefolder, decoded": """
from datasets import load_dataset
table = load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(work / "cache"))
for row in table:
    row["image"].load()
table.save_to_disk(str(work / "out"))
""",
}


def photographs(folder: Path, count: int, width: int, height: int) -> int:
    """Write `count` JPEGs into class folders; returns their mean size in bytes."""
    distinct = folder / "distinct"
    distinct.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(DISTINCT):
        patches = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        grain = rng.normal(size=(height, width, 1)) * 8
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
            distinct / f"{number}.jpg", quality=88
        )
    for number in range(count):
        place = folder / "photos" / f"class_{number % CLASSES:03d}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(distinct / f"{number % DISTINCT}.jpg", place / f"{number:07d}.jpg")
    return sum(path.stat().st_size for path in distinct.iterdir()) // DISTINCT


def run(contender: str, photos: Path, work: Path) -> dict[str, float]:
    """Seconds, processor seconds and peak memory (MB) of one contender in a fresh process."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    names = "".join(f"  - class {number:03d}\n" for number in range(CLASSES))
    (work / "bench.md").write_text(
        f"---\nversion: 1\nnoun: thing\nkind: kind\nsource: {{kind: folder, path: {photos}}}\n"
        f"classes:\n{names}---\n"
    )
    code = f"from pathlib import Path\nwork, photos = Path({str(work)!r}), Path({str(photos)!r})\n"
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", code + CONTENDERS[contender]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
    )
    complaint = child.stderr.read().decode() if child.stderr else ""
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    if status:
        sys.exit(f"{contender} failed:\n{complaint[-2000:]}")
    shutil.rmtree(work)
    return {
        "seconds": seconds,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Run the contenders in turns, print one table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingest", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=500, help="pixels")
    parser.add_argument("--height", type=int, default=375, help="pixels")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; medians are quoted")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--folder", type=Path, help="where to work; needs three times the images")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        size = photographs(Path(scratch), given.images, given.width, given.height)
        photos, work = Path(scratch) / "photos", Path(scratch) / "work"
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for _ in range(given.repeats):
            for name, done in runs.items():
                done.append(run(name, photos, work))
                print(f"{name}: {done[-1]['seconds']:.1f} s", file=sys.stderr)
    middle = {
        name: {key: statistics.median(r[key] for r in done) for key in done[0]}
        for name, done in runs.items()
    }
    print(f"{given.images:,} JPEGs of {given.width}x{given.height}, {size / 1000:.0f} kB each\n")
    print(f"{'':22} images/s  per core  memory MB")
    figures = []
    for name, run_ in middle.items():
        rate, core = given.images / run_["seconds"], given.images / run_["processor seconds"]
        print(f"{name:22} {rate:8.0f}  {core:8.0f}  {run_['memory']:9.0f}")
        figures += [
            {"figure": f"{name}: images per second", "value": rate, "goal": None, "unit": "1/s"},
            {"figure": f"{name}: per core", "value": core, "goal": None, "unit": "1/s"},
            {
                "figure": f"{name}: peak memory",
                "value": run_["memory"],
                "goal": 1024 if name == "download" else None,
                "unit": "MB",
            },
        ]
    ours = middle["download"]
    for name in list(CONTENDERS)[1:]:
        for key in ("seconds", "processor seconds"):
            ratio = middle[name][key] / ours[key]
            what = "rate" if key == "seconds" else "rate per core"
            print(f"{what} against {name}: {ratio:.2f}x")
            figures.append(
                {"figure": f"{what} against {name}", "value": ratio, "goal": 2, "unit": "x"}
            )
    results.write(given.json, figures, vars(given) | {"bytes per image": size})


if __name__ == "__main__":
    main()
