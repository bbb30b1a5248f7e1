"""How training starts: TRL is imported without vLLM until it is asked for, and no garbage collected."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.process
# What TRL's modules hold, but for their dunders, where nobody kept vLLM from them.
LATER = """
import importlib.util, sys
import {stage}
assert not [name for name in sys.modules if name.partition(".")[0] == "vllm"], "vLLM was imported"
from training.model import grpo_trainer
grpo_trainer.import_vllm()
for module in (grpo_trainer.client, grpo_trainer.generation):
    spec = importlib.util.find_spec(module.__name__)
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    missing = [name for name in vars(stock) if name not in vars(module)]
    assert not missing, missing
    assert module.is_vllm_available()
    flags = [name for name, value in vars(stock).items() if isinstance(value, bool)]
    assert {{f: vars(stock)[f] for f in flags}} == {{f: vars(module)[f] for f in flags}}
import vllm
from training.model.rollout_engine import RolloutEngine
assert grpo_trainer.generation.LLM is vllm.LLM
assert RolloutEngine.__mro__[1].generate.__globals__["LLM"] is vllm.LLM
"""

STAGE = """
import gc
from pathlib import Path
print("while it imports:", gc.isenabled())
from tasks.runtime.command import main

def started(output: Path) -> None:
    \"\"\"A stage.\"\"\"
    print("at work:", gc.isenabled())

if __name__ == "__main__":
    main(started)
"""


@pytest.mark.parametrize("stage", ["training.grpo", "training.sft_baseline", "training.sft"])
def test_no_vllm_is_imported_before_a_training_needs_it(stage):
    code = LATER.format(stage=stage)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("argument", "told"), [
    ("r.json", ["while it imports: False", "at work: True"]), ("--help", ["while it imports: True"]),
])  # fmt: skip
def test_a_stage_collects_garbage_once_it_has_imported(tmp_path, argument, told):
    (tmp_path / "r.json").write_text(json.dumps({"output": str(tmp_path / "made")}))
    code = (ROOT / "training/__init__.py").read_text()
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text(code)
    (tmp_path / "package/started.py").write_text(STAGE)
    done = subprocess.run(
        [sys.executable, "-m", "package.started", argument],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[: len(told)] == told
