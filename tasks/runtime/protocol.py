"""What the process of a stage and the run that started it agree on: names of files, exit codes."""

import json
from pathlib import Path
from typing import Any

from tasks.tables.shards import write_text

ERROR_FILE = "error.txt"
STATS_FILE = "stats.json"
PROGRESS_FILE = ".progress.json"  # what the bar stands at
SCRATCH = ("checkpoints", "cache")  # folders that only going on after a kill needs
DONE_FILE = ".done"  # the function has ended well, and all it wrote is on disk
STOPPED = 130  # exit code of a stage that was asked to stop, and did


def save_stats(output: Path, stats: dict[str, Any]) -> None:
    """Write a stage's counts, `stats.json`; they go into its manifest as well."""
    write_text(output / STATS_FILE, json.dumps(stats, indent=1))
