"""The real engines on the tiny policy: they agree, they are told apart, they survive a kill."""

import contextlib
import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import data_cards
from tasks.download import download
from tasks.engines.base import Request, Sampling
from tasks.engines.sampler import Sampler
from tasks.engines.server import ServerEngine
from tasks.engines.settings import EngineSettings
from tasks.engines.vllm import AsyncVllmEngine
from tasks.engines.worker import Ask
from tasks.language import prompts
from tasks.propose import propose
from tasks.runtime.errors import StageError
from tasks.runtime.memory import below
from tasks.split import split
from tasks.tables import shards
from tasks.tables.split_table import select
from tests.conftest import run_stage, settings_of, write_few_card
from tests.engines.test_pool import every_image_once
from training.sft import base_policy

pytestmark = pytest.mark.model
SETTINGS = settings_of(
    EngineSettings, max_new_tokens=24, max_model_len=768, max_num_seqs=64,
    gpu_memory_utilization=0.3, server_concurrency=16, server_timeout=60.0, seeds="engine",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A drawn set and a tiny policy that has learned a little, so that its answers are decided."""
    root = tmp_path_factory.mktemp("backends")
    write_few_card(root / "cards", "{pretrain: 20, train: 2, val: 1, test: 1}")
    for name in ("download", "split", "policy"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cards, "FOLDER", root / "cards")
        run_stage(download, root / "download", card="few", max_reject_share=0.0)
        run_stage(split, 
            root / "split", card="few", download=root / "download", protocol="base_to_novel",
            test_share=0.2, val_share=0.1, pretrain_share=0.2, seed=0,
        )  # fmt: skip
        run_stage(base_policy, 
            root / "policy", model="tiny", download=[root / "download"], split=[root / "split"],
            card="few", seed=0, prompt_style="brief", steps=60, batch_size=32, learning_rate=0.003,
            muon_learning_rate=0.02, question_share=0.5, blind_share=0.5, min_pixels=7056,
            max_pixels=7056, dtype="float32",
        )  # fmt: skip
        yield SimpleNamespace(
            root=root, download=root / "download", split=root / "split", policy=root / "policy"
        )


@pytest.fixture(scope="module")
def server(made) -> str:
    """vLLM's own OpenAI-compatible server on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (made.root / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made.policy),
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
         "--max-model-len", "512", "--gpu-memory-utilization", "0.2"],
        stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "TORCHDYNAMO_DISABLE": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, (made.root / "server.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (made.root / "server.log").read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            break
        except OSError:
            time.sleep(1)
    yield f"http://127.0.0.1:{port}/v1"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log.close()


def test_a_server_forgets_image_embeddings_of_older_weights_or_is_refused(server):
    """In its development mode, which TRL asks for, too; elsewhere the address is not known."""
    import requests

    from training.loop import vllm_check

    root = server.removesuffix("/v1")
    client = SimpleNamespace(session=requests.Session(), base_url=root)
    main = SimpleNamespace(is_main_process=True)
    engine = SimpleNamespace(mode="server", accelerator=main, vllm_client=client)
    vllm_check.forgetting(engine)()
    client.base_url = server
    with pytest.raises(StageError, match=r"404 .* freeze = vision projector"):
        vllm_check.forgetting(engine)


def asks(made, count: int = 20) -> list[Ask]:
    question = prompts.open_question("beetle", "species")
    rows = select(made.split, "train", ("base",))[:count]
    return [Ask(row["image_id"], question) for row in rows]


def greedy(made, name: str, **changed) -> list[str]:
    """Greedy answers to 20 images, by way of the crew and the shards."""
    output = made.root / f"greedy {name}"
    output.mkdir()
    with Sampler(made.policy, replace(SETTINGS, **changed), 1, 0) as sampler:
        sampler.run(output, "rollouts", asks(made), made.download, 7, name, greedy=True)
    return shards.read(output, "rollouts")["completion"].to_pylist()


@pytest.fixture(scope="module")
def reference(made) -> list[str]:
    return greedy(made, "transformers", backend="transformers")


LETTERS = Sampling(1, 0.0, 1.0, 1.0, 24, 0)


@pytest.fixture(scope="module")
def lettered(made) -> list[Request]:
    """Questions of two to five options whose answer must be a letter."""
    names = data_cards.load("few").classes
    rows = select(made.split, "test", ("base", "novel"))[:24]
    images = shards.ImageStore(made.download).read([row["image_id"] for row in rows])
    return [
        Request(
            row["image_id"],
            images[row["image_id"]],
            prompts.mcq_question("beetle", "species", names[i : i + 2 + i % 4]),
            choices=tuple("ABCDE"[: 2 + i % 4]),
        )
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def letters(made, lettered) -> list[str]:
    """The likeliest letter of each, read off the logits."""
    from tasks.engines.transformers import TransformersEngine

    engine = TransformersEngine(made.policy, replace(SETTINGS, backend="transformers"))
    answers = engine.generate(lettered, LETTERS)
    assert all(row[0].mean_logprob < 0 for row in answers)
    return [row[0].text for row in answers]


def test_a_servers_structured_output_keeps_to_the_letters(made, lettered, server):
    engine = ServerEngine(made.policy, replace(SETTINGS, server_url=server))
    try:
        answers = engine.generate(lettered, LETTERS)
    finally:
        engine.close()
    assert all(
        row[0].text in request.choices for row, request in zip(answers, lettered, strict=True)
    )


def test_the_policy_says_more_than_one_thing(reference):
    assert len(reference) == 20
    assert len(set(reference)) >= 3
    assert all("<answer>" in text for text in reference)


def test_vllm_agrees_with_transformers(made, reference):
    assert greedy(made, "vllm") == reference


def test_a_server_agrees_with_transformers(made, reference, server):
    changed = {"backend": "server", "server_url": server}
    assert greedy(made, "server", **changed) == reference


def test_ray_workers_agree_with_transformers(made, reference):
    assert greedy(made, "ray", backend="ray", processes=1) == reference


# vLLM leaves a socket context of its own to the garbage collector, which warns of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_vllm_beside_the_process_takes_shards_from_two_threads_and_agrees(
    made, reference, lettered, letters
):
    store = shards.ImageStore(made.download)
    chosen = asks(made)
    images = store.read([ask.image_id for ask in chosen])
    requests = [Request(ask.image_id, images[ask.image_id], ask.text) for ask in chosen]
    engine = AsyncVllmEngine(made.policy, SETTINGS)
    try:
        engine.check(requests[0])
        sampling = Sampling(1, 0.0, 1.0, 1.0, 24, 0)
        answers: dict[int, list] = {}
        threads = [
            threading.Thread(
                target=lambda part=part: answers.update(
                    {part: engine.generate(requests[part * 10 : part * 10 + 10], sampling)}
                )
            )
            for part in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sampled = engine.generate(requests[:2], Sampling(5, 1.0, 1.0, 1.0, 24, 0))
        seeded = [
            engine.generate(requests[:1], Sampling(1, 1.0, 1.0, 1.0, 24, seed))[0][0].text
            for seed in (7, 7, 8, 9, 10)
        ]
        before = engine.counts["cached_tokens"]
        ahead = prompts.listed(data_cards.load("few").classes * 2)
        for request in requests[:3]:
            engine.generate([replace(request, before=ahead)], sampling)
        cached = engine.counts["cached_tokens"] - before
        enforced = [row[0].text.strip() for row in engine.generate(lettered, LETTERS)]
    finally:
        engine.close()
        gc.collect()  # here, and not in another test
    assert [row[0].text for row in answers[0] + answers[1]] == reference
    assert [len(row) for row in sampled] == [5, 5]
    assert seeded[0] == seeded[1], "the engine is seeded for each batch"
    assert len(set(seeded)) > 1
    assert all(c.mean_logprob < 0 and c.num_tokens > 0 for row in sampled for c in row)
    assert enforced == letters, "structured output takes the likeliest letter"
    assert len(set(letters)) > 1
    assert cached > 100, "what stands before the image is computed once for all images"


def test_a_server_samples_n_and_says_what_is_cached(made, server, tmp_path):
    settings = replace(SETTINGS, backend="server", server_url=server)
    with Sampler(made.policy, settings, 4, 0) as sampler:
        sampler.run(tmp_path, "rollouts", asks(made, 6), made.download, 3, "server")
        figures = sampler.figures()
    rows = shards.read(tmp_path, "rollouts").to_pylist()
    assert len(rows) == 24
    assert len({row["completion"] for row in rows}) > 1
    assert all(row["num_tokens"] > 0 and row["mean_logprob"] < 0 for row in rows)
    assert figures["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"server_model": "another"}, "does not serve 'another' but"),
        ({"server_url": "http://127.0.0.1:9/v1"}, "nobody answers at"),
        ({"max_new_tokens": 100_000}, "the server refuses the longest prompt"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(made, server, tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr("tasks.engines.server.ATTEMPTS", 1)
    given = {"server_url": server, "server_timeout": 20.0} | changed
    settings = replace(SETTINGS, backend="server", **given)
    with pytest.raises(StageError, match=told), Sampler(made.policy, settings, 1, 0) as sampler:
        sampler.run(tmp_path, "rollouts", asks(made, 2), made.download, 2, "server")


def test_an_adapter_on_top_of_the_policy_answers_like_the_merged_weights(made, reference):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(made.policy, dtype=torch.float32)
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|v_proj|o_proj)"
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(made.root / "adapter")
    adapted.merge_and_unload().save_pretrained(made.root / "merged")
    AutoProcessor.from_pretrained(made.policy).save_pretrained(made.root / "merged")
    merged = SimpleNamespace(**{**vars(made), "policy": made.root / "merged"})
    expected = greedy(merged, "merged", backend="transformers")
    assert expected != reference, "the adapter changes answers"
    assert greedy(made, "adapter", lora=str(made.root / "adapter")) == expected


def test_a_server_that_sees_images_in_another_size_is_found_out(made, server, tmp_path):
    other = tmp_path / "policy"
    shutil.copytree(made.policy, other)
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = other / name
        if path.exists():
            path.write_text(path.read_text().replace("7056", "50176"))
    settings = replace(SETTINGS, backend="server", server_url=server, server_model=str(made.policy))
    output = tmp_path / "out"
    output.mkdir()
    with (
        pytest.raises(
            StageError, match=r"makes \d+ tokens of a prompt of which .* makes \d+; serve"
        ),
        Sampler(other, settings, 1, 0) as sampler,
    ):
        sampler.run(output, "rollouts", asks(made, 2), made.download, 2, "server")


def proposed(made, output: Path, **changed) -> list[dict]:
    output.mkdir(exist_ok=True)
    run_stage(propose, 
        output, card="few", download=made.download, split=made.split, policy=made.policy,
        engine=replace(SETTINGS, **changed), num_rollouts=20, prompt="open", shard_size=4,
        max_unparsed_share=1.0, fail_fast_unparsed_share=1.0, max_lost_share=0.0, limit=0, seed=0,
    )  # fmt: skip
    return shards.read(output, "rollouts").to_pylist()


def title(process: int) -> str:
    """A process's command line, or what it calls itself; "" of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    return ""


def kill_one(watched: Path, mark: str) -> threading.Thread:
    """Kill -9 one of our processes, whose command line or title holds `mark`, once two shards are there."""

    def watch() -> None:
        for _ in range(3000):
            if len(list(watched.glob("rollouts-*.parquet"))) >= 2:
                break
            time.sleep(0.05)
        ours = [process for process in below(os.getpid()) if re.search(mark, title(process))]
        os.kill(ours[0], signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_real_engine_killed_in_a_shard_loses_that_shard_at_most(made, capfd):
    output = made.root / "killed"
    whole = proposed(made, made.root / "whole")
    output.mkdir()
    killer = kill_one(output, "from multiprocessing.spawn")
    rows = proposed(made, output)
    killer.join()
    assert "the engine ended (killed by SIGKILL" in capfd.readouterr().err
    assert rows == whole, "on a CPU the very same draws"
    assert every_image_once(rows, made)


def test_a_ray_worker_killed_in_the_middle_loses_and_doubles_nothing(made):
    output = made.root / "ray killed"
    output.mkdir()
    killer = kill_one(output, "ray::.*RayStation|ray::MapWorker")
    rows = proposed(made, output, backend="ray", processes=2)
    killer.join()
    assert every_image_once(rows, made)
    assert not list(output.glob("*.tmp"))


def test_a_prompt_that_does_not_fit_is_an_error_with_the_numbers(made, tmp_path):
    settings = replace(SETTINGS, max_model_len=64)
    with (
        pytest.raises(
            StageError, match=r"longest prompt has \d+ tokens .*max_model_len is 64: raise"
        ),
        Sampler(made.policy, settings, 1, 0) as sampler,
    ):
        sampler.run(tmp_path, "rollouts", asks(made, 2), made.download, 2, "vllm")
