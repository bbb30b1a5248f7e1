"""Generating groups of completions from one copy of each prompt, against `generate` as TRL calls it.

    python -m tests.bench.generation --json FILE
    python -m tests.bench.generation --shapes small --prompts 700 --lengths 200 --groups 8 --questions 4

Random Qwen2.5-VLs of 7.8 and 55 million parameters. A prompt of 700 tokens has 512 of an image, one of
64 has 32. All completions have the full length; with `ragged` they end at random places, half of it on
average. A training step generates for several questions at a time: `questions`. Both sample with TRL's
options, on one thread, and take turns in one process. Medians of CPU seconds; before them what goes
through the model, counted by hooks.
"""

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tasks.engines.shared_prompts.generation import SharedPrompts
from tests.bench import results
from tests.bench.shared_prefix import END, FIRST, IMAGE, SHAPES, START, build

SHAPES["55m"] = {"vocabulary": 8192, "hidden": 512, "inner": 2048, "layers": 12, "heads": 8, "kv": 2, "tied": True, "vision": (6, 256, 768, 4)}  # fmt: skip
NAMES = {"small": "7.8 M", "55m": "55 M"}
GRIDS = {700: (1, 32, 64), 64: (1, 8, 16)}  # patches of 14 x 14 pixels, four to a token
GOALS = {("small", 700, 200, 8): ">= 2.5", ("55m", 700, 200, 8): ">= 2.5"}
Figure = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.generation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--prompts", nargs="+", type=int, choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[200, 32])
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 20])
    parser.add_argument("--questions", type=int, default=1, help="groups in a batch")
    parser.add_argument("--ragged", action="store_true", help="completions of several lengths")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures: list[Figure] = []
    for shape in given.shapes:
        model = build(shape, "cpu", torch.float32).eval()
        size = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(f"{NAMES[shape]}: {size:.1f} million parameters")
        for cell in itertools.product(given.prompts, given.lengths, given.groups):
            found = compare(model, shape, *cell, given)
            figures += found
            print(
                f"{found[0]['figure']:44} "
                + ", ".join(f"{f['value']:,} {f['unit']}" for f in found),
                flush=True,
            )
    results.write(given.json, figures, vars(given))


def compare(
    model: Any, shape: str, prompt: int, length: int, group: int, given: argparse.Namespace
) -> list[Figure]:
    """Counts, seconds and their ratio for one group."""
    runs = contenders(model, prompt, length, group, given)
    seen = {name: counted(model, run) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, run in runs.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["trl"], seconds["shared"], strict=True)]
    title = f"{NAMES[shape]}, P = {prompt}, C = {length}{', ragged' if given.ragged else ''}, G = {group}"
    title += f", {given.questions} groups" if given.questions > 1 else ""
    goal = GOALS.get((shape, prompt, length, group), "-")
    return [
        figure(f"{title}: TRL over shared", medians["trl"] / medians["shared"], goal, "x"),
        figure(f"{title}: least and most of the turns", min(ratios), "-", "x at least"),
        figure(f"{title}: most", max(ratios), "-", "x at most"),
        figure(f"{title}: TRL", medians["trl"], "-", "s"),
        figure(f"{title}: shared", medians["shared"], "-", "s"),
        figure(f"{title}: prompt tokens through the language model, TRL", seen["trl"]["prompt"], "-", "prompt tokens"),
        figure(f"{title}: the same, shared", seen["shared"]["prompt"], f"{seen['trl']['prompt'] // group:,}", "shared"),
        figure(f"{title}: completion tokens, TRL", seen["trl"]["completion"], "-", "completion tokens"),
        figure(f"{title}: the same, shared", seen["shared"]["completion"], "no more", "shared"),
        figure(f"{title}: patches through the vision tower, TRL", seen["trl"]["patches"], "-", "patches"),
        figure(f"{title}: the same, shared", seen["shared"]["patches"], f"{seen['trl']['patches'] // group:,}", "shared"),
    ]  # fmt: skip


def contenders(
    model: Any, prompt: int, length: int, group: int, given: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """`generate` on a copy of the prompt for each completion, as TRL calls it, and on one copy."""
    draw = torch.Generator().manual_seed(prompt)
    grid = torch.tensor([GRIDS[prompt]])
    image = int(grid.prod()) // 4
    text = torch.randint(FIRST, 1000, (prompt - image - 2,), generator=draw)
    marks = [torch.tensor([START]), torch.full((image,), IMAGE), torch.tensor([END])]
    ids = torch.cat([text[:20], *marks, text[20:]])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(int(grid.prod()), 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": grid,
    }
    many = given.questions
    copies = {name: value.repeat(many * group, 1) for name, value in inputs.items()}
    inputs = {name: value.repeat(many, 1) for name, value in inputs.items()}
    # Of random weights every token is about as likely: with these ends, half the length on average.
    vocabulary = model.config.get_text_config().vocab_size
    ends = list(range(FIRST, vocabulary, max(1, length * 5 // 8))) if given.ragged else [0]
    config = GenerationConfig(
        max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
        eos_token_id=ends, pad_token_id=0, suppress_tokens=[IMAGE, 0], disable_compile=True,
    )  # fmt: skip
    shared = SharedPrompts(model, print, check=False)  # the check takes a pass of its own
    prompts = [question for question in range(many) for _ in range(group)]
    return {
        "trl": lambda: model.generate(**copies, generation_config=config),
        "shared": lambda: shared.generate(dict(inputs), prompts, generation_config=config),
    }


def counted(model: Any, run: Callable[[], Any]) -> Counter[str]:
    """What goes through the model, by hooks; the run also warms up."""
    seen: Counter[str] = Counter()

    def tokens(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows, columns, _ = kwargs["inputs_embeds"].shape
        seen["prompt" if columns > 1 else "completion"] += rows * columns

    def patches(_module: Any, args: Any) -> None:
        seen["patches"] += len(args[0])

    hooks = [
        model.model.language_model.register_forward_pre_hook(tokens, with_kwargs=True),
        model.model.visual.register_forward_pre_hook(patches),
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def figure(name: str, value: float, goal: str, unit: str) -> Figure:
    rounded = value if isinstance(value, int) else float(f"{value:.3g}")
    return {"figure": name, "value": rounded, "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
