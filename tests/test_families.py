"""Other families than the default's go through Propose, Train and Evaluate: nothing knows their names."""

import json
import os
import subprocess
import sys

import pytest

from tasks import shards
from tests.conftest import ENGINE, ROOT, propose_arguments
from tests.test_train import arguments, frozen
from training.parts import PARTS

pytestmark = pytest.mark.model
__all__ = ["frozen"]  # the fixture

LINE = """
import json, sys
from pathlib import Path
from tests import families
from tasks.propose import propose
from tasks.evaluate import evaluate
from training.grpo import grpo
given = json.loads(Path(sys.argv[1]).read_text())
def paths(part):
    keys = ("download", "split", "policy", "base", "output")
    made = {k: Path(v) if k in keys and isinstance(v, str) else v for k, v in part.items()}
    return {k: [Path(p) for p in v] if k in ("mcq", "download", "split") and isinstance(v, list) else v
            for k, v in made.items()}
getattr(families, given["family"])(Path(given["policy"]), given["words"])
for name, stage in (("propose", propose), ("train", grpo), ("evaluate", evaluate)):
    Path(given[name]["output"]).mkdir()
    stage(**paths(given[name]))
"""


# Gemma-3's projector is a bare matrix, not a linear layer, and so has no adapter.
@pytest.mark.parametrize(
    ("family", "adapted"),
    [("gemma3", {"vision", "language"}), ("qwen3_vl", {"vision", "projector", "language"})],
)
def test_a_family_goes_through_propose_train_and_evaluate(
    family, adapted, frozen, tmp_path, drawn_once
):
    import shutil
    from types import SimpleNamespace

    shutil.copytree(drawn_once / "cards", tmp_path / "cards")
    policy, trained = tmp_path / "policy", tmp_path / "train"
    engine = {
        **ENGINE,
        "backend": "vllm",
        "processes": 1,
        "max_new_tokens": 8,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 0,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 1,
        "cpu_kv_cache_gib": 1,
        "quantization": "",
        "lora": "",
    }
    place = SimpleNamespace(root=policy, download=frozen / "download", split=frozen / "split")
    asked = {"engine": engine, "num_rollouts": 2, "max_unparsed_share": 1.0, "limit": 8}
    given = {
        "family": family,
        "policy": policy,
        "words": ["beetle", "species"],
        "propose": propose_arguments(place, output=tmp_path / "propose", **asked),
        "train": arguments(
            frozen,
            output=trained,
            base=policy,
            policy=policy,
            steps=2,
            lora_rank=4,
            lora_targets="vision projector language",
            learning_rate=1e-2,
            watch_every=2,
            watch_images=4,
        ),
        "evaluate": {
            "output": tmp_path / "evaluate",
            "card": "few",
            "download": frozen / "download",
            "split": frozen / "split",
            "policy": trained,
            "engine": engine,
            "part": "val",
            "num_rollouts": 2,
            "num_options": 5,
            "prompt": "open",
            "shard_size": 100,
            "seed": 0,
        },
    }
    (tmp_path / "given.json").write_text(json.dumps(given, default=str))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LINE, str(tmp_path / "given.json")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert shards.read(tmp_path / "propose", "rollouts").num_rows == 8 * 2
    log = shards.read(trained, "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2]
    assert any(row["grad_norm"] > 0 for row in log)
    assert (trained / "adapter" / "adapter_model.safetensors").exists()
    told = next(line for line in done.stdout.splitlines() if "parameters are trained" in line)
    assert {part for part in PARTS if f"{part} 0 of" not in told} == adapted
    predictions = shards.read(tmp_path / "evaluate", "predictions")
    assert set(predictions["mode"].to_pylist()) >= {"one_step", "majority", "two_step"}
