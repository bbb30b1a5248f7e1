"""Several families through BasePolicy, Propose, Train and Evaluate in one process: `FILE.json`.

vLLM takes longer to import than a tiny model to go through the whole line. For each family of the
file, what went wrong, what was printed and how many seconds each stage took is written beside it.
"""

import contextlib
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from tasks.engines.backends import open_engine
from tasks.engines.base import Engine
from tasks.engines.settings import EngineSettings
from tasks.evaluate import evaluate
from tasks.propose import propose
from tests import families
from tests.conftest import run_stage
from training.grpo import grpo
from training.sft import base_policy

STAGES = (
    ("base", base_policy),
    ("propose", propose),
    ("train", grpo),
    ("evaluate", evaluate),
    ("again", evaluate),
)


def vllm(policy: Path, settings: EngineSettings) -> Engine:
    """The backend of that name, in this process and not in one below it."""
    return open_engine(policy, replace(settings, backend="vllm"))


def transformers(policy: Path, settings: EngineSettings) -> Engine:
    """The same for this one."""
    return open_engine(policy, replace(settings, backend="transformers"))


def line(given: dict) -> dict[str, float]:
    """A family through all stages; seconds of each."""
    getattr(families, given["family"])(Path(given["base"]["model"]), given["words"])
    seconds = {}
    for name, stage in (pair for pair in STAGES if pair[0] in given):
        started = time.monotonic()
        output = Path(given[name].pop("output"))
        output.mkdir()
        run_stage(stage, output, **given[name])
        seconds[name] = round(time.monotonic() - started, 1)
    return seconds


def main(path: Path) -> None:
    told = {}
    for given in json.loads(path.read_text()):
        error, seconds, said = "", {}, path.with_name("said.txt")
        with said.open("w") as file, contextlib.redirect_stdout(file):
            try:
                seconds = line(given)
            except Exception:
                error = traceback.format_exc()
        told[given["family"]] = {"error": error, "said": said.read_text(), "seconds": seconds}
        path.with_name("told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
