"""The whole line on a model of real widths: seconds and peak memory, stage by stage.

    python -m tests.bench.real_shape --layers 2 --json FILE

A random Qwen2.5-VL with the widths, the vocabulary and the chat template of the published 3B (fewer
layers of its language model, as many of its vision tower as are asked for) goes through BasePolicy,
Propose, BuildMCQ, Train (LoRA of rank 8, gradient checkpointing, the first batch checked) and
Evaluate, each by its own command, in bfloat16. What random weights propose names nothing, so BuildMCQ
reads proposals that are made up. Half of the photographs have 12 megapixels, half 32 x
32 pixels. Run it alone; it needs 6 GB of memory with 2 layers, and more with more.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.evaluation.settings import EvaluateSettings
from tasks.questions.settings import ProposeSettings
from tasks.tables import shards
from tests import real_shape
from tests.bench import results
from tests.conftest import (
    ENGINE,
    ROOT,
    as_config,
    evaluate_arguments,
    mcq_arguments,
    propose_arguments,
    run_stage,
    settings_of,
    write_few_card,
    write_rollouts,
)
from tests.photographs import THUMBNAIL, TWELVE_MP, photograph, replaced

Figure = dict[str, Any]
STAGES = {
    "base": "training.sft",
    "propose": "tasks.propose",
    "mcq": "tasks.build_mcq",
    "train": "training.grpo",
    "evaluate": "tasks.evaluate",
}
IMAGES = 4  # of train, and as many of val


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.real_shape",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=2, help="of the language model's 36")
    parser.add_argument("--vision-layers", type=int, default=32, help="of the vision tower's 32")
    parser.add_argument("--tokens", type=int, default=128, help="an image may have")
    parser.add_argument(
        "--steps", type=int, default=1, help="of Train, 2 questions x 2 completions"
    )
    parser.add_argument("--backend", default="transformers", help="of Propose and Evaluate")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each stage")
    parser.add_argument("--narrow", action="store_true", help="small widths, to try the rest")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here and leave it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(given.keep or Path(folder), given)
    width = max(len(figure["figure"]) for figure in figures)
    for figure in figures:
        print(f"{figure['figure']:{width}}  {figure['value']:>12,} {figure['unit']}")
    results.write(given.json, figures, vars(given))


def run(root: Path, given: argparse.Namespace) -> list[Figure]:
    """Each stage's seconds and peak memory."""
    root.mkdir(exist_ok=True)
    prepare(root)
    started = time.monotonic()
    shape = {"layers": given.layers, "vision_layers": given.vision_layers, "narrow": given.narrow}
    weights = real_shape.write(root / "model", **shape)
    gc.collect()  # the model, which has references in circles
    figures = [
        _figure("weights", weights / 1e9, "billions"),
        _figure("drawing and writing them", time.monotonic() - started, "s"),
    ]
    for name, arguments in stages(root, given).items():
        config = as_config(root / f"{name}.json", arguments | {"output": root / name})
        started = time.monotonic()
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(given.threads)}
        done = subprocess.run(
            [sys.executable, "-m", STAGES[name], config],
            cwd=root,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        spent = time.monotonic() - started
        print(done.stdout, end="", flush=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}")
        peak = json.loads((root / name / ".done").read_text())["peak_memory_mb"]
        figures += [_figure(name, spent, "s"), _figure(f"{name}, peak memory", peak, "MB")]
        if name == "mcq":
            from tests.training.test_grpo import write_manifest

            write_manifest(root / "mcq")
    return figures


def prepare(root: Path) -> None:
    """Download and Split of a few drawn beetles, with photographs in place of the drawings."""
    import data_cards
    from tasks.download import download
    from tasks.split import split

    write_few_card(root / "cards", "{pretrain: 1, train: 1, val: 1, test: 1}")
    for name in ("drawn", "download", "split"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cards, "FOLDER", root / "cards")
        run_stage(download, root / "drawn", card="few", max_reject_share=0.0)
        shares = {"test_share": 0.2, "val_share": 0.1, "pretrain_share": 0.2}
        place = {"card": "few", "download": root / "drawn", "protocol": "base_to_novel", "seed": 0}
        run_stage(split, root / "split", **place, **shares)
        names = data_cards.load("few").classes
    rows = shards.read(root / "split", "split").to_pylist()
    rows.sort(key=lambda row: row["image_id"])
    train = [r for r in rows if r["split"] == "train" and r["group"] == "base"][:IMAGES]
    val = [
        row
        for group in ("base", "novel")
        for row in [r for r in rows if r["split"] == "val" and r["group"] == group][: IMAGES // 2]
    ]
    kept = {row["image_id"]: number for number, row in enumerate(train + val)}
    answers = [names[row["label"]] for row in train]
    write_rollouts(root / "made_up", {row["image_id"]: answers for row in train})
    path = shards.paths(root / "split", "split")[0]
    table = shards.read(root / "split", "split")
    shards.write(path, train + val, table.schema)
    large = [photograph(*TWELVE_MP, seed) for seed in range(2)]

    def chosen(number: int, image_id: str, data: bytes) -> bytes:
        if image_id not in kept:
            return data
        place = kept[image_id]
        return large[place // 2 % 2] if place % 2 == 0 else photograph(*THUMBNAIL, place)

    replaced(root / "drawn", root / "download", names, chosen)


def stages(root: Path, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each stage's arguments, in the order in which they run."""
    place = argparse.Namespace(root=root / "base", download=root / "download", split=root / "split")
    place.propose = root / "made_up"
    data = {"download": [place.download], "split": [place.split], "card": "few", "seed": 0}
    engine = replace(
        ENGINE,
        backend=given.backend,
        dtype="bfloat16",
        processes=1,
        repetition_penalty=1.05,
        max_new_tokens=12,
        max_model_len=1024,
        max_num_seqs=16,
        gpu_memory_utilization=0.5,
    )
    asked = {"engine": engine, "num_rollouts": 2, "max_unparsed_share": 1.0, "limit": IMAGES}
    evaluated = {"policy": root / "train", "engine": engine, "part": "val", "num_rollouts": 2}
    return {
        "base": {
            **data,
            "model": root / "model",
            "prompt_style": "brief",
            "steps": 0,
            "batch_size": 1,
            "learning_rate": 0.0,
            "muon_learning_rate": 0.0,
            "question_share": 0.0,
            "blind_share": 0.0,
            "min_pixels": 56 * 56,
            "max_pixels": given.tokens * 28 * 28,
            "dtype": "bfloat16",
        },
        "propose": settings_of(ProposeSettings).values() | propose_arguments(place, **asked),
        "mcq": mcq_arguments(place, top_up="random", max_lost_share=1.0),
        "train": trainer_arguments(root, given),
        "evaluate": settings_of(EvaluateSettings).values()
        | evaluate_arguments(place, shard_size=100, **evaluated),
    }


def trainer_arguments(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Adapters of rank 8 on the language model, on recomputed activations."""
    from tests.training.test_grpo import arguments

    return arguments(root) | {
        "base": root / "base",
        "policy": root / "base",
        "dtype": "bfloat16",
        "lora_rank": 8,
        "lora_alpha": 16.0,
        "steps": given.steps,
        "questions_per_step": 2,
        "num_generations": 2,
        "micro_batch_size": 4,
        "max_completion_length": 12,
        "learning_rate": 1e-4,
        "trl": {"beta": 0.0, "use_cpu": True, "gradient_checkpointing": True},
        "check_memory": True,
        "carry_over": False,
        "watch_every": given.steps,
        "watch_images": 2,
        "save_steps": given.steps,
    }


def _figure(name: str, value: float, unit: str) -> Figure:
    return {"figure": name, "value": float(f"{value:.4g}"), "goal": "-", "unit": unit}


if __name__ == "__main__":
    main()
