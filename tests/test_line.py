"""The whole line with the real vLLM and the real trainer, on a cut-down beetle set.

One run is killed in the middle of Propose, again in the middle of Train, and started once more;
the tests then look at what is there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifacts import store
from tasks.tables import shards
from tests.conftest import ROOT, write_few_card

SMALLER = {
    "steps = 240": "steps = 60",
    "num_rollouts = 20": "num_rollouts = 8",
    "min_options = 4": "min_options = 3",
    "shard_size = 100": "shard_size = 10",
    "max_unparsed_share = 0.5": "max_unparsed_share = 0.9",
    "max_lost_share = 0.2": "max_lost_share = 0.9",
    "steps = 20\n": "steps = 4\n",
    "questions_per_step = 24": "questions_per_step = 4",
    "num_generations = 8": "num_generations = 4",
    "micro_batch_size = 192": "micro_batch_size = 16",
    "save_steps = 10": "save_steps = 2",
    "watch_every = 10": "watch_every = 2",
    "watch_images = 64": "watch_images = 8",
}

pytestmark = pytest.mark.model


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", *arguments]


def settings() -> str:
    text = (ROOT / "luigi.cfg").read_text()
    for old, new in SMALLER.items():
        assert old in text, f"luigi.cfg no longer says {old}"
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    """A folder in which TrainDiVE ran to its end, once killed on the way."""
    folder = tmp_path_factory.mktemp("line")
    write_few_card(folder / "cards", "{pretrain: 20, train: 3, val: 1, test: 2}")
    (folder / "luigi.cfg").write_text(settings())
    run = command("TrainDiVE", "--dataset", "few")
    few = folder / "artifacts" / "few"
    kept = kill_when(
        run, folder, few / "round0/propose", "rollouts-*.parquet", "rollouts-00001.parquet"
    )
    kept |= kill_when(
        run,
        folder,
        few / "dive_k/round0/train",
        "completions-*.parquet",
        "checkpoints/checkpoint-2/complete",
    )
    (folder / "kept.json").write_text(json.dumps(kept))
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    (folder / "second.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def kill_when(
    run: list[str], folder: Path, stage: Path, finished: str, sign: str
) -> dict[str, int]:
    """Run until the stage's working folder holds the file `sign`; then kill -9 the whole group.

    Returns when each of its `finished` files was written, in nanoseconds.
    """
    with (folder / "killed.log").open("w") as log:
        process = subprocess.Popen(run, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 400
        while not list(stage.glob(f"*.partial/{sign}")):
            assert process.poll() is None, (folder / "killed.log").read_text()[-3000:]
            assert time.monotonic() < deadline, f"{stage} never wrote {sign}"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    partial = next(stage.glob("*.partial"))
    return {path.name: path.stat().st_mtime_ns for path in partial.glob(finished)}


def current(line: Path, stage: str) -> Path:
    return line / "artifacts" / "few" / stage / "current"


def test_a_killed_run_went_on_from_its_last_finished_shard(line):
    kept = json.loads((line / "kept.json").read_text())
    folder = current(line, "round0/propose")
    now = {p.name: p.stat().st_mtime_ns for p in folder.glob("rollouts-*.parquet")}
    kept = {name: at for name, at in kept.items() if name.startswith("rollouts")}
    assert len(kept) >= 2
    assert {name: now[name] for name in kept} == kept
    rows = shards.read(folder, "rollouts").to_pylist()
    assert set(Counter(row["image_id"] for row in rows).values()) == {8}
    assert len({(row["image_id"], row["rollout"]) for row in rows}) == len(rows) == 480
    assert not list(line.glob("artifacts/**/*.partial")), "leftovers"


def test_a_killed_training_went_on_from_its_checkpoint_as_if_nothing_had_been(line, tmp_path):
    kept = json.loads((line / "kept.json").read_text())
    folder = current(line, "dive_k/round0/train")
    for step in (1, 2):
        name = f"completions-{step:05d}.parquet"
        assert (folder / name).stat().st_mtime_ns == kept[name], f"step {step} was done again"
    recipe = json.loads((folder / "recipe.json").read_text())
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "output": str(unbroken)}))
    subprocess.run(
        [sys.executable, "-m", "training.grpo", str(tmp_path / "recipe.json")],
        cwd=line,
        check=True,
    )
    for step in (1, 2, 3, 4):
        tables = [shards.shard_path(place, "completions", step) for place in (folder, unbroken)]
        texts = [shards.read_file(table)["completion"].to_pylist() for table in tables]
        assert texts[0] == texts[1], f"step {step} sampled otherwise"
    digests = [shards.sha256_file(place / "model.safetensors") for place in (folder, unbroken)]
    assert digests[0] == digests[1]


def test_weights_of_another_shape_or_name_are_not_taken_up_silently(line, tmp_path):
    import torch

    from training.loop.checkpoints import restore_weights
    from training.model.tiny_policy import new_model

    policy = current(line, "base_policy")
    model = new_model(5)
    restore_weights(model, policy)
    name, tensor = next(iter(model.named_parameters()))
    assert torch.equal(tensor, dict(new_model(5).named_parameters())[name]) is False
    model.stranger = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match="stranger"):
        restore_weights(model, policy)


def test_the_summary_and_the_report_are_there(line):
    told = (line / "second.log").read_text()
    assert "harmonic mean" in told
    assert "95 %" in told
    metrics = json.loads((current(line, "dive_k/report") / "metrics.json").read_text())
    assert [e["name"] for e in metrics["evaluations"]] == ["zero_shot", "dive_k"]
    assert (current(line, "dive_k/report") / "index.html").stat().st_size > 10_000


def test_a_second_run_runs_nothing_and_a_changed_option_count_only_what_is_below(line):
    again = subprocess.run(
        command("TrainDiVE", "--dataset", "few"), cwd=line, capture_output=True, text=True
    )
    assert again.returncode == 0
    assert "ran successfully" not in again.stderr
    text = settings().replace("[BuildMCQ]\nnum_options = 4", "[BuildMCQ]\nnum_options = 3")
    (line / "luigi.cfg").write_text(text)
    run = command("BuildMCQ", "--dataset", "few")
    changed = subprocess.run(run, cwd=line, capture_output=True, text=True)
    assert changed.returncode == 0, changed.stderr
    assert "1 ran successfully" in changed.stderr
    assert len(list((line / "artifacts/few/dive_k/round0/build_mcq").glob("????????????????"))) == 2
    (line / "luigi.cfg").write_text(settings())
    other = current(line, "dive_k/round0/build_mcq").resolve()
    back = subprocess.run(run, cwd=line, capture_output=True, text=True)
    assert current(line, "dive_k/round0/build_mcq").resolve() != other
    assert "ran successfully" not in back.stderr


def test_training_changed_the_policy_and_logged_every_step(line):
    for number in (0, 1):
        folder = current(line, f"dive_k/round{number}/train")
        log = shards.read(folder, "train_log").to_pylist()
        steps = [4 * number + step for step in (1, 2, 3, 4)]  # rounds are one run
        assert [row["step"] for row in log] == steps
        assert all(np.isfinite(row["loss"]) for row in log)
        rows = shards.read(folder, "completions").to_pylist()
        assert Counter(row["step"] for row in rows) == dict.fromkeys(steps, 16)
        asked = set(
            shards.read(current(line, f"dive_k/round{number}/build_mcq"), "mcq")[
                "mcq_id"
            ].to_pylist()
        )
        assert {row["mcq_id"] for row in rows} <= asked
        rewards = np.array([row["reward/format"] + row["reward/letter"] for row in rows])
        means = rewards.reshape(4, 16).mean(axis=1)
        assert np.allclose(means, [row["reward"] for row in log], atol=1e-5)
    digests = [
        shards.sha256_file(current(line, place) / "model.safetensors")
        for place in ("base_policy", "dive_k/round0/train", "dive_k/round1/train")
    ]
    assert len(set(digests)) == 3


def test_round_one_proposed_with_the_policy_of_round_zero(line):
    manifest = store.read_manifest(current(line, "dive_k/round1/propose"))
    trained = store.read_manifest(current(line, "dive_k/round0/train"))
    assert manifest["inputs"]["policy"] == trained["fingerprint"]


def test_every_parquet_file_opens_with_pandas_duckdb_and_datasets(line, tmp_path):
    import duckdb
    import pandas as pd
    from datasets import load_dataset

    manifests = [store.read_manifest(p.parent) for p in line.glob("artifacts/few/**/manifest.json")]
    tables = {table for manifest in manifests for table in manifest["rows"]}
    assert tables >= {
        "images",
        "split",
        "rollouts",
        "candidates",
        "mcq",
        "train_log",
        "completions",
    }
    assert "predictions" in tables
    for path in line.glob("artifacts/few/**/????????????????/*.parquet"):
        rows = len(pd.read_parquet(path))
        assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(rows,)]
        loaded = load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path)
        )
        assert len(loaded) == rows > 0


ASK = """
import json, os, sys
from pathlib import Path
from tasks.language import prompts
from tasks.tables import shards
from tasks.engines.backends import open_engine
from tasks.engines.base import Request, Sampling
from tasks.engines.settings import EngineSettings
from tests.conftest import settings_of
policy, download, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
engine = open_engine(policy, settings_of(EngineSettings, backend=backend))
rows = shards.read(download, "images").to_pylist()[-20:]
text = prompts.open_question("beetle", "species")
asked = [Request(r["image_id"], r["image"]["bytes"], text) for r in rows]
answers = engine.generate(asked, Sampling(1, 0.0, 1.0, 1.0, 32, 0))
print(json.dumps([row[0].text for row in answers]))
"""


def test_transformers_and_vllm_answer_alike_from_the_trained_folder(line):
    policy = current(line, "dive_k/round1/train")
    answers = {}
    for backend in ("transformers", "vllm"):
        ran = subprocess.run(
            [sys.executable, "-c", ASK, str(policy), str(current(line, "download")), backend],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        answers[backend] = json.loads(ran.stdout.strip().splitlines()[-1])
    assert len(answers["vllm"]) == 20
    assert answers["vllm"] == answers["transformers"]


def test_train_refuses_a_shard_that_is_not_the_frozen_one(line, tmp_path):
    import shutil

    from tasks.runtime.errors import StageError
    from training.loop.session import verify

    copied = tmp_path / "mcq"
    shutil.copytree(current(line, "dive_k/round0/build_mcq"), copied)
    verify(copied)
    path = shards.paths(copied, "mcq")[0]
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StageError, match="is not the shard that BuildMCQ froze"):
        verify(copied)


def test_no_artifact_holds_a_pickle(line):
    names = {p.suffix for p in (line / "artifacts").rglob("*") if p.is_file()}
    assert not names & {".pkl", ".pickle", ".bin", ".pt", ".pth"}
