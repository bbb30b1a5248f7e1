"""A whole training step on the tiny policy: shared prefix against TRL's own trainer.

    python -m tests.bench.train_step --json FILE
    python -m tests.bench.train_step --side 700 --questions 4 --length 200      # long prompts

Drawn beetles and multiple-choice prompts as in the default run: 24 questions a step, eight
completions each of up to 32 tokens, one micro-batch, one thread. With `--side` the pictures are
enlarged to a square of so many pixels, 625 tokens for 700. The two trainers take turns in one
process: in each turn three steps from the same weights and seed, of which the first warms up.
Medians of CPU seconds a step; generation is told apart from the rest, which is the reference pass,
scoring, forward, backward and optimiser.
"""

import argparse
import io
import itertools
import random
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from data_cards import load
from tasks.ingest.sources import open_source
from tasks.language import prompts
from tests.bench import results
from training.model import tiny_policy
from training.shared_prefix.trainer import make_trainer

GROUP, STEPS = 8, 3
Figure = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--turns", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--beta", type=float, default=0.05, help="weight of the KL term")
    parser.add_argument("--side", type=int, help="pixels of the pictures; default: as drawn")
    parser.add_argument("--questions", type=int, default=24, help="questions a step")
    parser.add_argument("--length", type=int, default=32, help="tokens of a completion at most")
    given = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder), given)
    width = max(len(figure["figure"]) for figure in figures)
    for figure in figures:
        print(f"{figure['figure']:{width}}  {figure['value']:>10,} {figure['unit']}")
    results.write(given.json, figures, vars(given) | {"group": GROUP})


def compare(folder: Path, given: argparse.Namespace) -> list[Figure]:
    """Counters, then seconds, of both trainers."""
    card = load("beetles")
    side = given.side or tiny_policy.IMAGE_SIDE
    words = tiny_policy.slot_words(card.classes)
    model, processor = tiny_policy.build(words, seed=0, max_pixels=side**2)
    tiny_policy.save(model, processor, folder / "policy")
    rows = questions(card, folder, given)
    spent: dict[str, list[tuple[float, float]]] = {"stock": [], "shared": []}
    for turn in range(given.turns):
        for kind, seconds in spent.items():
            trainer = build(folder, kind, rows, processor, given)
            clock = Clock(trainer)
            trainer.add_callback(clock)
            with redirect_stdout(io.StringIO()):
                trainer.train()
            seconds += clock.steps[1:]
            if kind == "shared" and turn == 0:
                counters = trainer.counters
    whole = {kind: statistics.median(s for s, _ in found) for kind, found in spent.items()}
    rest = {kind: statistics.median(s - g for s, g in found) for kind, found in spent.items()}
    return [
        _figure("tokens through the language model a step, stock", counters.lm_tokens_stock / STEPS),
        _figure("the same, shared", counters.lm_tokens / STEPS),
        _figure("useful of forwarded completion tokens", counters.completion_tokens_useful
                / counters.completion_tokens_forwarded, ">= 0.95", "share"),
        _figure("images processed for each unique one", counters.image_processor_calls
                / counters.unique_images, "<= 1", "calls"),
        _figure("a training step, stock", whole["stock"], unit="CPU s"),
        _figure("a training step, shared", whole["shared"], unit="CPU s"),
        _figure("stock over shared", whole["stock"] / whole["shared"], "report", "x"),
        _figure("all but generation, stock", rest["stock"], unit="CPU s"),
        _figure("all but generation, shared", rest["shared"], unit="CPU s"),
        _figure("stock over shared, all but generation", rest["stock"] / rest["shared"], "report", "x"),
    ]  # fmt: skip


def questions(card: Any, folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows as `training.data.dataset` makes them, on drawn images with five random options."""
    draw = random.Random(0)
    source = open_source(card, folder, folder)
    rows = []
    count = (STEPS + 1) * given.questions
    for number, item in enumerate(itertools.islice(source.items(0), count)):
        options = draw.sample(list(card.classes), 5)
        text = prompts.mcq_question(card.noun, card.kind, options, style="brief")
        image = Image.open(io.BytesIO(item.load())).convert("RGB")
        if given.side:
            image = image.resize((given.side, given.side))
        rows.append(
            {"prompt": [{"role": "user", "content": text}], "image": image, "mcq_id": str(number)}
        )
    return rows


def build(
    folder: Path, kind: str, rows: list[dict[str, Any]], processor: Any, given: argparse.Namespace
) -> Any:
    """A trainer of either kind with the settings of the default run."""
    from transformers import AutoModelForImageTextToText

    config = GRPOConfig(
        output_dir=str(folder / kind),
        max_steps=STEPS,
        learning_rate=1e-4,
        num_generations=GROUP,
        max_completion_length=given.length,
        per_device_train_batch_size=given.questions * GROUP,
        beta=given.beta,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        shuffle_dataset=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    processor.tokenizer.padding_side = "left"
    with redirect_stdout(io.StringIO()):
        trainer = make_trainer(
            model=AutoModelForImageTextToText.from_pretrained(folder / "policy"),
            shared_prefix=kind == "shared",
            check_first_batch=False,
            args=config,
            processing_class=processor,
            train_dataset=Dataset.from_list(rows),
            reward_funcs=length_reward,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs within a group, so that every group is trained on."""
    return [float(len(completion[-1]["content"]) % 7) for completion in completions]


class Clock(TrainerCallback):
    """CPU seconds of each step, and of its generation."""

    def __init__(self, trainer: GRPOTrainer):
        self.steps: list[tuple[float, float]] = []
        self.generation = self.started = 0.0
        generate = trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return generate(*args, **kwargs)
            finally:
                self.generation += time.process_time() - started

        trainer._generate_single_turn = timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.generation, self.started = 0.0, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((time.process_time() - self.started, self.generation))


def _figure(name: str, value: float, goal: str = "-", unit: str = "") -> Figure:
    return {"figure": name, "value": float(f"{value:.4g}"), "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
