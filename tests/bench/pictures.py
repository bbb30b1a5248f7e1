"""What photographs take in main memory before a policy sees them: whole, and at the policy's limit.

    python -m tests.bench.pictures --json pictures.json

A slot of Propose holds the pictures of a shard, here all of `--images`. Train reads a generation
batch, of 8 questions with 8 completions each, as often as its loss takes turns, here 4. Before:
decoded in full, and once a row, as `datasets` does. After: as Propose and Train do. Seconds are
until the processor is done with each picture once; MB are what memory grows by while the pictures
are read, at its peak and after it. Each measurement is a process of its own. Last, what the processor makes
of one picture either way is compared: the mean difference of a value, of 255 levels.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.bench import results

QUESTIONS, COMPLETIONS, TURNS = 8, 8, 4
MEASURED = [(part, way) for part in ("slot", "batch") for way in ("whole", "scaled")]


def photograph(number: int, width: int, height: int) -> bytes:
    """A JPEG with detail at every scale, grain, and shapes with hard edges."""
    rng = np.random.default_rng(number)
    light = np.full((height, width, 3), 127, dtype=np.float32)
    for columns, weight in ((6, 0.66), (24, 0.4), (96, 0.27), (384, 0.17), (1500, 0.1)):
        coarse = rng.integers(0, 256, (columns * 3 // 4, columns, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        light += weight * (np.asarray(smooth, dtype=np.float32) - 127)
    light += rng.standard_normal((height, width, 1), dtype=np.float32) * 8
    image = Image.fromarray(light.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, size = rng.integers(0, width), rng.integers(0, height), rng.integers(9, height // 8)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x, y, x + size, y + size), fill=colour)
        draw.line((x, y, x + size, y + 2 * size), fill=(0, 0, 0), width=3)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def build(folder: Path, images: int, distinct: int, width: int, height: int) -> None:
    """A Download artifact and frozen questions of `images` photographs, `distinct` ones repeated."""
    from tasks.tables import schemas, shards

    drawn = [photograph(number, width, height) for number in range(distinct)]
    names = ["crow", "gull"]
    with (
        shards.Writer(folder / "images.parquet", schemas.images(names)) as download,
        shards.Writer(folder / "mcq-00000.parquet", schemas.mcq()) as questions,
    ):
        for number in range(images):
            image = {"bytes": drawn[number % distinct], "path": f"{number}.jpg"}
            both = {"image_id": f"bench/{number}", "image": image}
            download.add(_row(download.schema, **both, width=width, height=height))
            if number >= QUESTIONS:
                continue
            asked = {"options": names, "answer_letter": "A", "option_class_ids": [0, 1]}
            questions.add(_row(questions.schema, **both, **asked, mcq_id=f"{number}"))


def _row(schema: Any, **known: Any) -> dict[str, Any]:
    """The known columns; nothing in the others."""
    return {name: known.get(name) for name in schema.names}


def slot(folder: Path, decode: Any, images: int) -> tuple[Callable[[], list[Any]], int]:
    """Hold the pictures of a shard as a worker and its engine do."""
    from tasks.engines.base import Sampling
    from tasks.engines.worker import Query, Shard, Worker

    worker = Worker(lambda: SimpleNamespace(decode=decode))  # type: ignore[arg-type]
    queries = tuple(Query(f"bench/{number}", "?") for number in range(images))
    shard = Shard(0, folder / "out.parquet", folder, queries, Sampling(1, 0.0, 1.0, 1.0, 1, 0))

    def read() -> list[Any]:
        requests.extend(worker._requests(shard))
        return [request.picture for request in requests]

    requests: list[Any] = []  # held until the shard is done
    return read, 1


def batch(folder: Path, decode: Any, scaled: bool) -> tuple[Callable[[], list[Any]], int]:
    """Read a generation batch as TRL's dataloader does."""
    from datasets import Dataset, disable_progress_bars

    from training.data.dataset import Questions

    disable_progress_bars()
    cache = folder / f"cache-{scaled}"
    numbers = [number for number in range(QUESTIONS) for _ in range(COMPLETIONS)]
    if scaled:
        card = SimpleNamespace(name="bench", noun="bird", kind="species")
        asked = Questions([folder], [card], "brief", seed=0, cache=cache, decode=decode)  # type: ignore[list-item]
        rows = asked.rows(QUESTIONS)
    else:
        path = str(folder / "mcq-00000.parquet")
        frozen = Dataset.from_parquet(path, cache_dir=str(cache))
        rows = frozen.select(range(QUESTIONS)).flatten_indices().with_transform(lambda each: each)

    def read() -> list[Any]:
        return [row["image"] for row in rows.__getitems__(numbers)][::COMPLETIONS]

    return read, TURNS


def measure(part: str, way: str, given: argparse.Namespace) -> dict[str, float]:
    """Seconds and MB of one measurement, in this process."""
    from tasks.tables.pixels import Decoder

    processor = policys_processor(given.max_pixels)
    processor.image_processor([Image.new("RGB", (84, 84))], return_tensors="pt")
    decode = Decoder(processor if way == "scaled" else None)
    if part == "slot":
        read, turns = slot(given.folder, decode, given.images)
    else:
        read, turns = batch(given.folder, decode, way == "scaled")
    before, started = _resident(), time.perf_counter()
    for _ in range(turns):
        pictures = read()
    peak, held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, _resident()
    for picture in pictures:
        processor.image_processor([picture], return_tensors="pt")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": peak - before, "held": held - before}


def _resident() -> float:
    """MB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def policys_processor(max_pixels: int) -> Any:
    """A processor of Qwen-VL's kind."""
    from training.model import tiny_policy

    return tiny_policy.processor((), min_pixels=56**2, max_pixels=max_pixels)


def difference(data: bytes, max_pixels: int) -> float:
    """How far off a value is, in the mean, after the processor, in levels of 255."""
    from tasks.tables.pixels import Decoder

    own = policys_processor(max_pixels).image_processor
    both = [Decoder(SimpleNamespace(image_processor=each))(data) for each in (None, own)]
    whole, scaled = (own([picture], return_tensors="np")["pixel_values"] for picture in both)
    return float(np.abs(whole - scaled).mean() * np.mean(own.image_std) * 255)


def main() -> None:
    """Make the photographs, measure, print one table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, default=100, help="of a shard")
    parser.add_argument(
        "--distinct", type=int, default=10, help="photographs; the rest repeat them"
    )
    parser.add_argument("--width", type=int, default=4000, help="pixels")
    parser.add_argument("--height", type=int, default=3000, help="pixels")
    parser.add_argument("--max-pixels", type=int, default=401_408, help="what the policy takes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure, given)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), given.images, given.distinct, given.width, given.height)
        found = {each: _in_a_process(*each, scratch, given) for each in MEASURED}
    print(
        f"{given.images} photographs of {given.width}x{given.height}; {given.max_pixels:,} pixels"
    )
    figures = []
    for part, way in MEASURED:
        line = found[part, way]
        seconds, peak, held = line["seconds"], line["peak"], line["held"]
        print(f"{part:6} {way:7} {seconds:7.1f} s, peak {peak:6.0f} MB, held {held:6.0f} MB")
        figures += [
            {"figure": f"{part}, {way}: {name}", "value": value, "goal": None, "unit": unit}
            for name, value, unit in (
                ("seconds", seconds, "s"), ("peak memory", peak, "MB"), ("memory held", held, "MB"),
            )
        ]  # fmt: skip
    off = difference(photograph(0, given.width, given.height), given.max_pixels)
    print(f"values differ by {off:.2f} of 255 levels in the mean")
    figures.append({"figure": "mean difference", "value": off, "goal": None, "unit": "levels"})
    results.write(given.json, figures, vars(given))


def _in_a_process(part: str, way: str, scratch: str, given: argparse.Namespace) -> dict[str, float]:
    sizes = ["--images", str(given.images), "--max-pixels", str(given.max_pixels)]
    command = [sys.executable, "-m", "tests.bench.pictures", "--measure", part, way, *sizes]
    done = subprocess.run([*command, "--folder", scratch], stdout=subprocess.PIPE, check=True)
    print(f"{part}, {way}: done", file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
