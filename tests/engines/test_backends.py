"""The real engines on the tiny policy: they agree, and what they cannot do is refused."""

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import pytest

import data_cards
from tasks.engines.base import Request, Sampling
from tasks.engines.sampler import Sampler
from tasks.engines.server import ServerEngine
from tasks.engines.vllm import AsyncVllmEngine
from tasks.language import prompts
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.split_table import select
from tests.engines.conftest import SETTINGS, queries

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def server(tiny) -> str:
    """vLLM's own OpenAI-compatible server on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tiny.root / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny.policy),
         "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
         "--max-model-len", "512", "--gpu-memory-utilization", "0.2"],
        stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "TORCHDYNAMO_DISABLE": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, (tiny.root / "server.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (tiny.root / "server.log").read_text()[-3000:]
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


def greedy(tiny, name: str, **changed) -> list[str]:
    """Greedy answers to 20 images, by way of the worker pool and the shards."""
    output = tiny.root / f"greedy {name}"
    output.mkdir()
    with Sampler(tiny.policy, replace(SETTINGS, **changed), 1, 0) as sampler:
        sampler.run(output, "rollouts", queries(tiny), tiny.download, 7, name, greedy=True)
    return shards.read(output, "rollouts")["completion"].to_pylist()


@pytest.fixture(scope="module")
def reference(tiny) -> list[str]:
    return greedy(tiny, "transformers", backend="transformers")


LETTERS = Sampling(1, 0.0, 1.0, 1.0, 24, 0)


@pytest.fixture(scope="module")
def lettered(tiny) -> list[Request]:
    """Questions of two to five options whose answer must be a letter."""
    names = data_cards.load("few").classes
    rows = select(tiny.split, "test", ("base", "novel"))[:24]
    images = shards.ImageStore(tiny.download).read([row["image_id"] for row in rows])
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
def letters(tiny, lettered) -> list[str]:
    """The likeliest letter of each, read off the logits."""
    from tasks.engines.transformers import TransformersEngine

    engine = TransformersEngine(tiny.policy, replace(SETTINGS, backend="transformers"))
    answers = engine.generate(lettered, LETTERS)
    assert all(row[0].mean_logprob < 0 for row in answers)
    return [row[0].text for row in answers]


def test_a_servers_structured_output_keeps_to_the_letters(tiny, lettered, server):
    engine = ServerEngine(tiny.policy, replace(SETTINGS, server_url=server))
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


def test_vllm_agrees_with_transformers(tiny, reference):
    assert greedy(tiny, "vllm") == reference


def test_a_server_agrees_with_transformers(tiny, reference, server):
    changed = {"backend": "server", "server_url": server}
    assert greedy(tiny, "server", **changed) == reference


def test_ray_workers_agree_with_transformers(tiny, reference):
    assert greedy(tiny, "ray", backend="ray", processes=1) == reference


# vLLM leaves a socket context of its own to the garbage collector, which warns of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_vllm_beside_the_process_takes_shards_from_two_threads_and_agrees(
    tiny, reference, lettered, letters
):
    store = shards.ImageStore(tiny.download)
    asked = queries(tiny)
    images = store.read([query.image_id for query in asked])
    requests = [Request(query.image_id, images[query.image_id], query.text) for query in asked]
    engine = AsyncVllmEngine(tiny.policy, SETTINGS)
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


def test_a_server_samples_n_and_says_what_is_cached(tiny, server, tmp_path):
    settings = replace(SETTINGS, backend="server", server_url=server)
    with Sampler(tiny.policy, settings, 4, 0) as sampler:
        sampler.run(tmp_path, "rollouts", queries(tiny, 6), tiny.download, 3, "server")
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
def test_a_server_that_cannot_be_used_is_named(tiny, server, tmp_path, monkeypatch, changed, told):
    monkeypatch.setattr("tasks.engines.server.ATTEMPTS", 1)
    given = {"server_url": server, "server_timeout": 20.0} | changed
    settings = replace(SETTINGS, backend="server", **given)
    with pytest.raises(StageError, match=told), Sampler(tiny.policy, settings, 1, 0) as sampler:
        sampler.run(tmp_path, "rollouts", queries(tiny, 2), tiny.download, 2, "server")


def test_an_adapter_on_top_of_the_policy_answers_like_the_merged_weights(tiny, reference):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny.policy, dtype=torch.float32)
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|v_proj|o_proj)"
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=12, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(tiny.root / "adapter")
    adapted.merge_and_unload().save_pretrained(tiny.root / "merged")
    AutoProcessor.from_pretrained(tiny.policy).save_pretrained(tiny.root / "merged")
    merged = SimpleNamespace(**{**vars(tiny), "policy": tiny.root / "merged"})
    expected = greedy(merged, "merged", backend="transformers")
    assert expected != reference, "the adapter changes answers"
    assert greedy(tiny, "adapter", lora=str(tiny.root / "adapter")) == expected


def test_an_adapter_on_the_vision_tower_which_vllm_leaves_out_is_refused(tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny.policy)
    config = LoraConfig(r=8, target_modules=r".*visual.*qkv", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tiny.root / "seeing")
    with pytest.raises(
        StageError, match=r"adapts more than the language model \(.*visual.*vLLM would leave"
    ):
        greedy(tiny, "seeing", lora=str(tiny.root / "seeing"))


def test_a_server_that_sees_images_in_another_size_is_found_out(tiny, server, tmp_path):
    other = tmp_path / "policy"
    shutil.copytree(tiny.policy, other)
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = other / name
        if path.exists():
            path.write_text(path.read_text().replace("7056", "50176"))
    settings = replace(SETTINGS, backend="server", server_url=server, server_model=str(tiny.policy))
    output = tmp_path / "out"
    output.mkdir()
    with (
        pytest.raises(
            StageError, match=r"makes \d+ tokens of a prompt of which .* makes \d+; serve"
        ),
        Sampler(other, settings, 1, 0) as sampler,
    ):
        sampler.run(output, "rollouts", queries(tiny, 2), tiny.download, 2, "server")


def test_a_prompt_that_does_not_fit_is_an_error_with_the_numbers(tiny, tmp_path):
    settings = replace(SETTINGS, max_model_len=64)
    with (
        pytest.raises(
            StageError, match=r"longest prompt has \d+ tokens .*max_model_len is 64: raise"
        ),
        Sampler(tiny.policy, settings, 1, 0) as sampler,
    ):
        sampler.run(tmp_path, "rollouts", queries(tiny, 2), tiny.download, 2, "vllm")
