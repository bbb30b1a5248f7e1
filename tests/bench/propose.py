"""Rollouts per second: ours beside transformers' `generate`, one image at a time and batched.

    python -m tests.bench.propose --json propose.json            # 50 M parameters, for a CPU
    python -m tests.bench.propose --shape 7b --images 256        # on a GPU

The model has random weights, for speed does not depend on them, and never ends of itself, so that
every rollout has the same number of tokens. Each contender is a process of its own, loaded once and
then given the same images in turns; loading is not timed. (a) `ours` is the whole path of Propose:
images from Parquet, prefetch, vLLM with n samples a request, shards written. (b) `one image` is
`generate(num_return_sequences=n)` an image at a time, as the method's first implementation does.
(c) `batched` is the `transformers` backend.

The second table is the wall time of a worker over the time its engine was busy: with an engine of
fixed latency, and with the real one.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.engines.base import Completion, Request, Sampling
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Query, Shard, ShardReport, Worker
from tasks.language import prompts
from tasks.tables import shards
from tests.bench import results
from tests.conftest import run_stage, settings_of

SHAPES: dict[str, dict[str, Any]] = {
    "50m": {"hidden": 512, "inner": 1536, "layers": 12, "heads": 8, "kv": 2, "vision": (8, 384, 1024, 6)},
    "3b": {"hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv": 2, "vision": (32, 1280, 3420, 16)},
    "7b": {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv": 4, "vision": (32, 1280, 3420, 16)},
}  # fmt: skip
# Dense bf16 TFLOP/s and memory TB/s, from the makers' data sheets.
PEAKS = {"H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.0), "L40S": (362, 0.864)}
CONTENDERS = ("ours", "one image", "batched")


def write_policy(folder: Path, shape: str, max_pixels: int, dtype: str) -> int:
    """A Qwen2.5-VL of this shape with random weights; returns its number of parameters."""
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    from training.model import tiny_policy

    given = SHAPES[shape]
    config = tiny_policy.config()
    half = given["hidden"] // given["heads"] // 2
    text = config.text_config
    text.hidden_size, text.intermediate_size = given["hidden"], given["inner"]
    text.num_hidden_layers, text.num_attention_heads = given["layers"], given["heads"]
    text.num_key_value_heads, text.initializer_range = given["kv"], 0.02
    text.layer_types = ["full_attention"] * given["layers"]
    text.rope_parameters["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = given["vision"]
    vision.out_hidden_size, vision.fullatt_block_indexes = (
        given["hidden"],
        list(range(vision.depth)),
    )
    torch.set_default_dtype(getattr(torch, dtype))
    model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    # Without an end token every rollout runs to the limit.
    for part in (model.config, model.config.text_config):
        part.eos_token_id = None
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=True)
    tiny_policy.save(model, tiny_policy.processor((), max_pixels=max_pixels), folder)
    return sum(p.numel() for p in model.parameters())


def settings(given: argparse.Namespace) -> EngineSettings:
    """The settings of `[engine]` that all contenders share."""
    return settings_of(
        EngineSettings, dtype=given.dtype, max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs, max_new_tokens=given.tokens, cpu_kv_cache_gib=2,
    )  # fmt: skip


def contender(kind: str, link: Any, policy: Path, given: argparse.Namespace) -> None:
    """A process: load, then answer each list of shards; replies with seconds, and with its memory."""
    from tasks.engines.backends import open_engine

    worker = Worker(lambda: open_engine(policy, settings(given)))
    if kind != "ours":
        from tasks.engines import transformers

        transformers.BATCH = 1 if kind == "one image" else given.batch
        worker = Worker(lambda: transformers.TransformersEngine(policy, settings(given)))
    while (todo := link.recv()) is not None:
        told: list[ShardReport] = []
        warm = replace(todo[0], path=todo[0].path.with_suffix(".warm"), queries=todo[0].queries[:1])
        worker.work([warm], told.append)
        before, started = told[-1].busy, time.perf_counter()
        worker.work(todo, told.append)
        wall = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        link.send((wall, told[-1].busy - before, memory))


class FixedLatency:
    """An engine that takes a fixed time a shard, and lets the images be decoded beforehand."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        for request in requests:
            _ = request.picture.size
        time.sleep(self.seconds)
        return [[Completion("x" * 200, "stop", 50, -1.0)] * sampling.n for _ in requests]


def roofline(shape: str, parameters: int, given: argparse.Namespace, device: str) -> float | None:
    """Rollouts per second that the device's arithmetic and memory allow at most; None if unknown.

    Two FLOPs a parameter and token, prompts once an image; weights read once a decoding step.
    """
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    if peak is None:
        return None
    flops, memory = peak[0] * 1e12, peak[1] * 1e12
    prompt = given.max_pixels / 28**2 + 60
    arithmetic = 2 * parameters * (prompt / given.n + given.tokens) / flops
    reading = given.tokens * 2 * parameters / given.max_num_seqs / memory
    return 1 / max(arithmetic, reading)


def main() -> None:
    """Build model and images, run the contenders in turns, print the tables, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.propose", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", choices=SHAPES, default="50m")
    parser.add_argument("--images", type=int, default=8, help="images a turn")
    parser.add_argument("--n", type=int, default=20, help="rollouts an image")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a rollout")
    parser.add_argument("--repeats", type=int, default=3, help="turns; medians are quoted")
    parser.add_argument("--shard", type=int, default=4, help="images a shard")
    parser.add_argument("--batch", type=int, default=4, help="images a batch for (c)")
    parser.add_argument("--max-pixels", type=int, default=64 * 28**2)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), given)
    results.write(given.json, figures, vars(given))


def measure(scratch: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures."""
    import torch

    import data_cards
    from tasks.download import download
    from tests.bench.ingest import photographs

    photographs(scratch, max(given.images, 200), 500, 375)
    names = "".join(f"  - class {number:03d}\n" for number in range(50))
    (scratch / "bench.md").write_text(
        f"---\nversion: 1\nnoun: thing\nkind: kind\n"
        f"source: {{kind: folder, path: {scratch / 'photos'}}}\nclasses:\n{names}---\n"
    )
    data_cards.FOLDER = scratch
    for name in ("download", "policy", "out"):
        (scratch / name).mkdir()
    run_stage(download, scratch / "download", card="bench", max_reject_share=0.0)
    parameters = write_policy(scratch / "policy", given.shape, given.max_pixels, given.dtype)
    ids = shards.read(scratch / "download", "images", ["image_id"])["image_id"].to_pylist()
    text = prompts.open_question("thing", "kind")

    def turn(kind: str, number: int, count: int, size: int, n: int) -> list[Shard]:
        sampling = Sampling(n, 1.0, 1.0, 1.0, given.tokens, number)
        queries = [Query(image_id, text) for image_id in ids[:count]]
        return [
            Shard(i, scratch / "out" / f"{kind}-{number}-{i:05d}.parquet", scratch / "download", tuple(part), sampling)
            for i, part in enumerate(shards.chunks(queries, size))
        ]  # fmt: skip

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor()
    print(f"{parameters / 1e6:.0f} M parameters, {given.dtype}, {device or 'CPU'}", file=sys.stderr)
    figures, runs_of = [], rates(turn, scratch / "policy", given)
    done = given.images * given.n
    print(f"\n{'':12} rollouts/s  tokens/s  memory MB")
    for kind, runs in runs_of.items():
        rate = done / statistics.median(run[0] for run in runs)
        memory = max(run[2] for run in runs)
        print(f"{kind:12} {rate:10.2f}  {rate * given.tokens:8.0f}  {memory:9.0f}")
        figures += [
            {"figure": f"{kind}: rollouts per second", "value": rate, "goal": None, "unit": "1/s"},
            {"figure": f"{kind}: peak memory", "value": memory, "goal": None, "unit": "MB"},
        ]
    ours = statistics.median(run[0] for run in runs_of.get("ours", [(float("nan"),)]))
    for kind in [k for k in runs_of if k != "ours"]:
        ratio = statistics.median(run[0] for run in runs_of[kind]) / ours
        print(f"ours against {kind}: {ratio:.1f}x")
        figures.append(
            {"figure": f"ours against {kind}", "value": ratio, "goal": None, "unit": "x"}
        )
    roof = roofline(given.shape, parameters, given, device)
    if roof:
        print(f"roofline {roof:.0f} rollouts/s; ours {done / ours / roof:.1%} of it")
        figures.append({"figure": "share of the roofline", "value": done / ours / roof, "goal": 0.4, "unit": "1"})  # fmt: skip
    told: list[ShardReport] = []
    worker = Worker(lambda: FixedLatency(0.25))
    started = time.perf_counter()
    worker.work(turn("latency", 0, 200, 10, 20), told.append)
    waits = {"fixed latency": (time.perf_counter() - started) / told[-1].busy}
    if "ours" in runs_of:
        waits["vLLM"] = statistics.median(run[0] / run[1] for run in runs_of["ours"])
    print("\nwall time over the time the engine was busy")
    for kind, value in waits.items():
        print(f"{kind:14} {value:.3f}")
        figures.append({"figure": f"wall over busy, {kind}", "value": value, "goal": 1.05, "unit": "x"})  # fmt: skip
    return figures


def rates(turn: Any, policy: Path, given: argparse.Namespace) -> dict[str, list[tuple]]:
    """(seconds, busy seconds, memory) of every contender and turn."""
    context = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for kind in given.contenders:
        links[kind], theirs = context.Pipe()
        process = context.Process(target=contender, args=(kind, theirs, policy, given))
        process.start()
        processes.append(process)
    runs: dict[str, list[tuple]] = {kind: [] for kind in links}
    for number in range(given.repeats + 1):
        for kind, link in links.items():
            link.send(turn(kind.replace(" ", "-"), number, given.images, given.shard, given.n))
            result = link.recv()
            if number:  # the first turn loads and warms up
                runs[kind].append(result)
                print(f"{kind}: {result[0]:.1f} s", file=sys.stderr)
    for link in links.values():
        link.send(None)
    for process in processes:
        process.join()
    return runs


if __name__ == "__main__":
    main()
