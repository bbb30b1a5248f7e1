"""vLLM inside the trainer answers the trainer's own prompts by the trainer's own weights."""

import hashlib
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
from trl.generation.vllm_generation import VLLMGeneration

from data_cards import load
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests import prefix_models, stub_vllm
from tests.conftest import ROOT
from tests.training.test_grpo import arguments, frozen
from training.loop import vllm_check
from training.loop.trl_settings import of_reference_alone
from training.loop.validation import Sample, Watch
from training.model.rollout_engine import RolloutEngine, RolloutsByVllm

__all__ = ["frozen"]  # the fixture
TRL_SOURCES = {
    "_init_vllm": "0e584002e0f6",
    "sync_weights": "63d669fb3230",
    "generate": "2d2ac2be5b13",
}


def test_trl_is_the_version_whose_interface_to_vllm_is_wrapped():
    """A new TRL needs `training.model.rollout_engine` read against it; then put the new digests here."""
    sources = {name: inspect.getsource(getattr(VLLMGeneration, name)) for name in TRL_SOURCES}
    found = {k: hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in sources.items()}
    assert found == TRL_SOURCES


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def made(policy, tmp_path, monkeypatch):
    """Makes trainers whose vLLM is a second copy of the model."""
    monkeypatch.setattr(RolloutEngine, "_init_vllm", stub_vllm.start)
    return lambda **given: prefix_models.trainer(policy, tmp_path, use_vllm=True, **given)


ROWS = prefix_models.questions(6)  # of images of two sizes


@pytest.mark.model
@pytest.mark.parametrize("shared", [True, False])
def test_a_vllm_of_the_same_weights_agrees_and_nothing_of_the_training_moves(made, shared, capsys):
    one = made(shared=shared, temperature=0.7, top_p=0.9, repetition_penalty=1.05)
    engine = one.vllm_generation
    decoding = {key: vars(engine)[key] for key in ("temperature", "top_p", "repetition_penalty")}
    generators, training = torch.get_rng_state(), one.model.training
    assert vllm_check.check_vllm(one, ROWS) < 0.005
    assert "log-probabilities of 60 tokens" in capsys.readouterr().out
    assert torch.equal(generators, torch.get_rng_state())
    assert {key: vars(engine)[key] for key in decoding} == decoding
    asked = engine.llm.sampling[-1]
    assert (asked.temperature, asked.top_p, asked.repetition_penalty) == (0.7, 1.0, 1.0)
    assert one.model.training is training
    assert engine.llm.forgotten == 1
    one.train()
    assert engine.llm.sampling[-1].top_p == 0.9
    assert engine.llm.loaded > 0


@pytest.mark.model
def test_what_a_vllm_can_get_wrong_ends_the_run_before_its_first_step(made):
    one = made()
    engine = one.vllm_generation
    engine.llm.blind = True
    with pytest.raises(StageError, match="other weights, prompts or pictures"):
        vllm_check.check_vllm(one, ROWS)
    engine.llm.blind = False
    engine.llm.noise = 0.1  # to both sides, as rounding is
    vllm_check.check_vllm(one, ROWS)
    engine.llm.noise = 0.0
    with torch.no_grad():
        for weight in one.model.parameters():
            weight.add_(0.3 * weight.std(correction=0) * torch.randn_like(weight))
    with pytest.raises(StageError, match="other weights"):
        vllm_check.check_vllm(one, ROWS)
    one._last_loaded_step = -1  # so that they are handed over
    assert vllm_check.check_vllm(one, ROWS) < 0.005
    with torch.no_grad():
        one.model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(StageError, match="nan apart"):
        vllm_check.check_vllm(one, ROWS)


@pytest.mark.model
def test_a_vllm_that_makes_other_tokens_of_a_prompt_is_found_out(made, monkeypatch):
    """As vLLM 0.31 does of the prompts that TRL 1.16 hands it by itself."""
    one = made()
    monkeypatch.setattr(RolloutsByVllm, "_unexpanded", lambda *_: {})
    with pytest.raises(StageError, match=r"vLLM makes 19 tokens .* processor makes 16"):
        vllm_check.check_vllm(one, ROWS)


@pytest.mark.model
@pytest.mark.process
def test_processes_judge_alike(policy, tmp_path):
    """The vLLM of one of two is blind: both of them refuse, with the same figures."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         "-m", "tests.stub_vllm", str(policy), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    agreed, refused = (tmp_path / "0.txt").read_text().splitlines()
    assert (tmp_path / "1.txt").read_text().splitlines() == [agreed, refused]
    assert "other weights, prompts or pictures" in refused


@pytest.mark.model
@pytest.mark.parametrize("users", [False, True])
def test_options_of_the_reference_are_not_said_to_be_ignored(policy, tmp_path, caplog, users):
    """TRL says so of a policy that is loaded already; what a user has set, it says still."""
    given = {"model_init_kwargs": {"dtype": "bfloat16"}}
    with of_reference_alone(given if users else {}):
        one = prefix_models.trainer(policy, tmp_path, beta=0.05, **given)
    assert ("model_init_kwargs" in caplog.text) is users
    assert one.ref_model.dtype == torch.bfloat16


def watching(count: int) -> Watch:
    from io import BytesIO

    def encoded(row):
        row["image"].save(buffer := BytesIO(), "PNG")
        return buffer.getvalue()

    rows = prefix_models.questions(count, seed=5)
    samples = [Sample(f"x/{i}", 0, 0, encoded(row)) for i, row in enumerate(rows)]
    return Watch(samples, [load("beetles")], "brief", 1, 10, ends=[7, 9])


@pytest.mark.model
def test_val_images_are_asked_of_vllm_by_the_weights_of_the_step(made, monkeypatch):
    """In one call, greedily, with the answers that transformers gives."""
    one, watch = made(), watching(5)
    answered = []
    for way in ("_by_vllm", "_by_model"):
        own = getattr(Watch, way)
        monkeypatch.setattr(
            Watch, way, lambda *a, own=own: answered.append(own(*a)) or answered[-1]
        )
    with torch.no_grad():  # so that an answer depends on its picture
        for name, weight in one.model.named_parameters():
            weight.mul_(8.0 if "o_proj" in name or "down_proj" in name else 1.0)
    one.state.global_step = 3
    llm = one.vllm_generation.llm
    generators = torch.get_rng_state()
    for _ in range(2):
        watch.seen.clear()
        watch.look(one, 3)
    assert torch.equal(generators, torch.get_rng_state())
    assert llm.calls == 2  # and one hand-over: the second time, the weights are there
    assert llm.loaded == len(list(one.model.parameters()))
    assert {(s.temperature, s.repetition_penalty, s.max_tokens) for s in llm.sampling} == {
        (0.0, 1.0, 10)
    }
    one.use_vllm = False
    watch.seen.clear()
    watch.look(one, 3)
    vllm, again, model = answered
    assert vllm == again == model
    assert len(set(vllm)) > 1


@pytest.mark.model
def test_what_is_watched_is_not_shaped_by_the_policys_own_decoding(made, monkeypatch):
    """A repetition penalty in its generation_config, and end tokens of which it has several."""
    one, watch = made(), watching(2)
    one.use_vllm = False
    plain = watch._by_model(one, watch.samples)
    shaped = one.model.generation_config
    shaped.repetition_penalty, shaped.top_k, shaped.no_repeat_ngram_size = 5.0, 3, 1
    assert watch._by_model(one, watch.samples) == plain
    assert one.model.generation_config is shaped
    greedy = watch._greedy(one)
    assert greedy.eos_token_id == [2, 7, 9]
    assert not greedy.do_sample


# The engine itself, where it can be had: vLLM's CPU build.

REAL = """
import json, sys
from pathlib import Path
import torch
import trl.generation.vllm_generation as generation
import data_cards
import vllm.model_executor.layers.utils as layers
from tests.conftest import run_stage
from training import grpo
from training.loop import trl_settings
from training.shared_prefix import vllm_correction
# The CPU build packs weights and drops the originals, so that no others can be taken up.
layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(
    layer, "cpu_linear", torch.nn.functional.linear)
def eager(LLM=generation.LLM, **given):
    print("\\nLLM", json.dumps([given["limit_mm_per_prompt"], given["max_model_len"]]), flush=True)
    return LLM(**given, enforce_eager=True)
generation.LLM = eager
trl_settings.vllm_takes_weights = lambda: True
def log(trainer, ratio, difference, counted, log=vllm_correction.log):
    told = difference[counted.bool() & ~difference.isnan()]
    print("\\nAPART", told.abs().mean().item(), flush=True)
    log(trainer, ratio, difference, counted)
vllm_correction.log = log
given = json.loads(Path(sys.argv[1]).read_text())
data_cards.FOLDER = Path(given.pop("cards"))
run_stage(grpo.grpo, Path(given.pop("output")), **given)
"""


@pytest.mark.model
@pytest.mark.process
def test_a_run_with_the_real_engine(frozen, tmp_path, drawn_once):
    """vLLM's CPU build, colocated by TRL: it agrees, takes up weights, is watched, and stays close.

    Adapters on all parts, so that vision weights move and images must be encoded again.
    """
    given = arguments(
        frozen,
        trl={"beta": 0.0, "use_cpu": True, "use_vllm": True, "vllm_gpu_memory_utilization": 0.3},
        lora_rank=4,
        lora_targets="vision projector language",
        learning_rate=1e-2,
        truth_rollout=True,
        watch_every=2,
        save_steps=2,
    )
    given |= {"output": tmp_path / "train", "cards": drawn_once / "cards"}
    given["output"].mkdir()
    (tmp_path / "given.json").write_text(json.dumps(given, default=str))
    environment = {
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "given.json")],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told = next(line for line in done.stdout.splitlines() if "vLLM and the trainer's" in line)
    assert float(told.split(" apart")[0].split()[-1]) < 0.02
    log = shards.read(tmp_path / "train", "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [row["step"] for row in log if row["val_accuracy"] is not None] == [2, 4]
    apart = [float(line.split()[1]) for line in done.stdout.splitlines() if line[:5] == "APART"]
    assert len(apart) == 4 * 2
    limit, context = next(json.loads(x[4:]) for x in done.stdout.splitlines() if x[:4] == "LLM ")
    assert (limit, context) == ({"image": 1, "video": 0}, 128)
    assert max(apart) < 0.02  # also after the weights have moved
