"""A group's forward and backward pass: image and prompt once, against TRL's own pass.

    python -m tests.bench.shared_prefix --json FILE
    python -m tests.bench.shared_prefix --device cuda --shape 3b --dtype bfloat16 --update

A Qwen2.5-VL with random weights, a prompt of 700 tokens of which 512 are image, eight completions.
Naive is TRL 1.16's own method, shared is the trainer's; both go through TRL's fused head, and the
loss weighs each completion's log-probabilities. The two run in turns in one process; medians of
the turns. On a CPU one thread and its CPU time, on a GPU the wall time, with gradient
checkpointing. With `--update` an AdamW step is part of the pass, as in a training step.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.bench import results
from training.shared_prefix import attention
from training.shared_prefix.forward import Rows, packed

PROMPT, GROUP, GRID = 700, 8, (1, 32, 64)  # tokens, completions, patches of 14 x 14 pixels
IMAGE, START, END, FIRST = 5, 3, 4, 10  # token ids; ordinary ones from FIRST on
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocabulary": 1024, "hidden": 256, "inner": 1024, "layers": 6, "heads": 4, "kv": 2, "tied": False, "vision": (4, 128, 384, 4)},
    "3b": {"vocabulary": 151936, "hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv": 2, "tied": True, "vision": (32, 1280, 3420, 16)},
    "7b": {"vocabulary": 152064, "hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv": 4, "tied": False, "vision": (32, 1280, 3420, 16)},
}  # fmt: skip
GOALS = {"cpu": {200: ">= 3.0", 64: ">= 4.5"}, "cuda": {200: ">= 2.5", 64: ">= 2.5"}}
Figure = dict[str, Any]
Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.shared_prefix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--update", action="store_true", help="with an optimiser step")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    model = build(given.shape, given.device, getattr(torch, given.dtype))
    figures = []
    for length, ragged in ((200, False), (64, False), (200, True)):
        figures += compare(model, length, ragged, given)
    width = max(len(figure["figure"]) for figure in figures)
    for figure in figures:
        value = f"{figure['value']:,}" if isinstance(figure["value"], int) else figure["value"]
        print(f"{figure['figure']:{width}}  {value!s:>10} {figure['unit']:12} {figure['goal']}")
    results.write(given.json, figures, vars(given) | {"prompt": PROMPT, "group": GROUP})


def build(shape: str, device: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """A model of this shape with random weights, TRL's head and the shared attention."""
    given = SHAPES[shape]
    size = given["hidden"] // given["heads"]
    depth, vision_hidden, vision_inner, vision_heads = given["vision"]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": given["vocabulary"],
            "hidden_size": given["hidden"],
            "intermediate_size": given["inner"],
            "num_hidden_layers": given["layers"],
            "num_attention_heads": given["heads"],
            "num_key_value_heads": given["kv"],
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": given["tied"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [size // 8, size * 3 // 16, size * 3 // 16],
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_inner,
            "num_heads": vision_heads,
            "out_hidden_size": given["hidden"],
            "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7 or i == depth - 1],
        },
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=given["tied"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.train()
    if device != "cpu":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    attention.install(model)
    return model


def rows(model: torch.nn.Module, length: int, ragged: bool) -> Rows:
    """One group: the same prompt and image in each row, completions of their own."""
    device, dtype = model.device, model.dtype
    draw = torch.Generator().manual_seed(length)
    image = GRID[1] * GRID[2] // 4
    text = torch.randint(FIRST, 1000, (PROMPT - image - 2,), generator=draw)
    marks = [torch.tensor([START]), torch.full((image,), IMAGE), torch.tensor([END])]
    prompt = torch.cat([text[:20], *marks, text[20:]]).expand(GROUP, -1)
    completion = torch.randint(FIRST, 1000, (GROUP, length), generator=draw)
    lengths = torch.full((GROUP, 1), length)
    if ragged:
        lengths = torch.randint(length // 4, length + 1, (GROUP, 1), generator=draw)
        lengths[0] = length
    mask = (torch.arange(length)[None] < lengths).long()
    patches = torch.randn(GRID[1] * GRID[2], 3 * 2 * 14 * 14, generator=draw)
    ids = torch.cat([prompt, completion * mask], 1)
    images = {
        "pixel_values": patches.to(device, dtype),
        "image_grid_thw": torch.tensor([GRID], device=device),
        "num_images": [1] * GROUP,
        "mm_token_type_ids": (ids == IMAGE).long().to(device),
    }
    whole = torch.cat([torch.ones_like(prompt), mask], 1)
    return Rows([0] * GROUP, ids.to(device), whole.to(device), length, images, per_group=True)


def contenders(model: torch.nn.Module, batch: Rows) -> dict[str, Run]:
    """Passes that give (log-probabilities, entropies) of (rows, completion tokens)."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
        args=SimpleNamespace(report_to=[]),
    )
    stock = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    mine = batch.by_row(range(GROUP))  # TRL's batch holds the copies already

    def naive() -> tuple[torch.Tensor, torch.Tensor]:
        logps, entropies, _ = stock(
            trainer, model, batch.input_ids, batch.attention_mask, batch.keep,
            compute_entropy=True, **mine,
        )  # fmt: skip
        return logps, entropies

    def shared() -> tuple[torch.Tensor, torch.Tensor]:
        found = packed(model, batch, range(GROUP))
        empty = found.logps.new_zeros(GROUP * batch.keep)
        put = (empty.index_copy(0, found.place, x) for x in (found.logps, found.entropies))
        logps, entropies = (x.view(GROUP, batch.keep) for x in put)
        return logps, entropies

    return {"naive": naive, "shared": shared}


def compare(
    model: torch.nn.Module, length: int, ragged: bool, given: argparse.Namespace
) -> list[Figure]:
    """Counters, agreement, time and memory at one completion length."""
    batch = rows(model, length, ragged)
    runs = contenders(model, batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0) if given.update else None
    seen = {name: _counted(model, run) for name, run in runs.items()}
    measured = {name: _gradient(model, run, batch) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peak = dict.fromkeys(runs, 0.0)
    for turn in range(given.repeats + 1):
        for name, run in runs.items():
            spent, memory = _timed(model, run, batch, optimiser)
            if turn:  # the first of each only warms up
                seconds[name].append(spent)
                peak[name] = max(peak[name], memory)
    title = f"C = {length}{', ragged' if ragged else ''}"
    goals = {} if ragged else GOALS[torch.device(given.device).type]
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    (ours, our_gradient), (theirs, their_gradient) = measured["shared"], measured["naive"]
    relative = float((our_gradient - their_gradient).norm() / their_gradient.norm())
    useful = sum(batch.completions)
    ideal = PROMPT + useful
    saved = (seen["naive"][0] - seen["shared"][0]) / (seen["naive"][0] - ideal)
    figures = [
        _figure(f"{title}: tokens through the language model, naive", seen["naive"][0]),
        _figure(f"{title}: the same, shared", seen["shared"][0]),
        _figure(f"{title}: of the ideal saving", saved, ">= 0.98", "share"),
        _figure(f"{title}: patches through the vision tower, naive", seen["naive"][1]),
        _figure(f"{title}: the same, shared", seen["shared"][1], f"{seen['naive'][1] // GROUP:,}"),
        _figure(
            f"{title}: useful of forwarded completion tokens",
            useful / (seen["shared"][0] - PROMPT + 1),
            ">= 0.95",
            "share",
        ),
        _figure(
            f"{title}: largest difference of a log-probability", float((ours - theirs).abs().max())
        ),
        _figure(f"{title}: difference of the gradient over its norm", relative),
        _figure(f"{title}: naive", medians["naive"], unit="s"),
        _figure(f"{title}: shared", medians["shared"], unit="s"),
        _figure(
            f"{title}: naive over shared",
            medians["naive"] / medians["shared"],
            goals.get(length, "-"),
            "x",
        ),
    ]
    if any(peak.values()):
        figures += [
            _figure(f"{title}: peak memory, naive", peak["naive"], unit="GiB"),
            _figure(f"{title}: peak memory, shared", peak["shared"], "no more", "GiB"),
        ]
    return figures


def _loss(run: Run, batch: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss with advantages of both signs, and the log-probabilities that count."""
    logps, _ = run()
    mask = batch.attention_mask[:, -batch.keep :]
    advantages = torch.linspace(-1, 1, GROUP, device=logps.device)[:, None]
    return -(logps * advantages * mask).sum() / mask.sum(), logps.detach() * mask


def _timed(model: torch.nn.Module, run: Run, batch: Rows, optimiser: Any) -> tuple[float, float]:
    """(seconds, peak GiB) of one pass; CPU seconds and no memory on a CPU."""
    model.zero_grad(set_to_none=True)
    gpu = batch.input_ids.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if gpu else time.process_time
    started = clock()
    _loss(run, batch)[0].backward()
    if optimiser is not None:
        optimiser.step()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started, torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0


def _gradient(model: torch.nn.Module, run: Run, batch: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities, and the gradient of every hundredth weight at large shapes."""
    model.zero_grad(set_to_none=True)
    loss, logps = _loss(run, batch)
    loss.backward()
    every = 1 if sum(p.numel() for p in model.parameters()) < 1e8 else 100
    parts = [p.grad.flatten()[::every].float() for p in model.parameters() if p.grad is not None]
    return logps, torch.cat(parts)


def _counted(model: torch.nn.Module, run: Run) -> tuple[int, int]:
    """(tokens through the language model, patches through the vision tower), by hooks."""
    seen = [0, 0]

    def tokens(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen[0] += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]

    def patches(_module: Any, args: Any, _kwargs: Any) -> None:
        seen[1] += len(args[0])

    hooks = [
        model.model.language_model.register_forward_pre_hook(tokens, with_kwargs=True),
        model.model.visual.register_forward_pre_hook(patches, with_kwargs=True),
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


def _figure(name: str, value: float, goal: str = "-", unit: str = "") -> Figure:
    rounded = value if isinstance(value, int) else float(f"{value:.3g}")
    return {"figure": name, "value": rounded, "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
