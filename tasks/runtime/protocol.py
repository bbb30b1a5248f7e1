"""What the process of a stage and the run that started it agree on: file names and exit codes."""

import json
import shutil
from pathlib import Path
from typing import Any

from tasks.tables.durable import write_text

ERROR_FILE = "error.txt"  # the one sentence of a failed stage
STATS_FILE = "stats.json"  # the stage's counts
PROGRESS_FILE = ".progress.json"  # the figures of the progress bar
SCRATCH = ("checkpoints", "cache")  # folders that only a run which resumes this one needs
DONE_FILE = ".done"  # the stage's function has returned, and all it wrote is on disk
ZERO_SHOT = "zero_shot"  # the method that stands for the base policy, which is never trained
# All training methods, which pipeline.methods describes, and the base policy. In luigi.cfg [Train:sft] is the
# section of a method and [Train:cub] that of a data card, so that no card may have one of these names.
METHOD_NAMES = (
    "dive_k",
    "no_refresh",
    "virft",
    "virft_compat",
    "ttrv",
    "dive_k_majority",
    "sft",
    "random_mcq",
    "text_mcq",
    "hard_negative",
    "visurf",
    "contrast",
    "caption",
    "direct",
    ZERO_SHOT,
)
STOPPED = 130  # exit code of a stage that was asked to stop, and did


def save_stats(output: Path, stats: dict[str, Any]) -> None:
    """Write a stage's counts to `stats.json`. The manifest repeats them."""
    write_text(output / STATS_FILE, json.dumps(stats, indent=1))


def remove_scratch(output: Path) -> None:
    """Delete the folders that only a resumed run needs."""
    for name in SCRATCH:
        shutil.rmtree(output / name, ignore_errors=True)
