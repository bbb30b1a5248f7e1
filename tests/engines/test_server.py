"""The server backend against a server that fails in every way it can."""

import itertools
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from tasks.engines.base import EngineDied, Request, Sampling
from tasks.engines.refusals import REFUSED, generate_or_refuse
from tasks.engines.server import ServerEngine
from tasks.engines.settings import EngineSettings
from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from tests.ingest.test_pictures import encoded, photograph
from tests.stub_server import Handler, serving

SAMPLING = Sampling(3, 1.0, 0.9, 1.0, 16, 5)


@pytest.fixture
def server(monkeypatch):
    """A stub that answers n times, or with the status that `statuses` has for an attempt."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    state = SimpleNamespace(
        statuses=[], asked=[], large="", root="/somewhere/policy", owner="vllm", content=""
    )

    class Model(Handler):
        def do_GET(self):
            model = {"id": "m", "object": "model", "owned_by": state.owner, "root": state.root}
            self.answer(200, {"object": "list", "data": [model]})

        def do_POST(self):
            body = self.json_asked()
            state.asked.append(body)
            status = state.statuses.pop(0) if state.statuses else 200
            if state.large and state.large in body["messages"][0]["content"][-1]["text"]:
                status = 413
            if status != 200:
                message = f"status {status} for {self.headers['Authorization']}"
                self.answer(status, {"error": {"message": message}})
                return
            token = {"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": []}
            choices = [
                {
                    "index": i,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": state.content or f"answer {i}"},
                    "logprobs": {"content": [token, token]},
                }
                for i in range(body["n"])
            ]
            usage = {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
            reply = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
            self.answer(200, {**reply, "choices": choices, "usage": usage})

    state.engines = []
    with serving(Model) as url:
        state.url = f"{url}/v1"
        yield state
        for engine in state.engines:
            engine.close()


def opened(server, policy, seeds: str = "request", **changed) -> ServerEngine:
    settings = settings_of(
        EngineSettings, backend="server", server_url=server.url, server_model="m",
        server_timeout=5.0, server_concurrency=4, seeds=seeds, max_new_tokens=16,
        **changed,
    )  # fmt: skip
    server.engines.append(ServerEngine(policy, settings))
    return server.engines[-1]


def requests(count: int) -> list[Request]:
    return [Request(f"set/{i}", encoded(photograph(i)), f"question {i}") for i in range(count)]


@pytest.fixture
def policy(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    return folder


def test_every_request_is_answered_n_times_in_order_with_its_own_seed(server, policy):
    engine = opened(server, policy)
    answers = engine.generate(requests(6), SAMPLING)
    assert [[c.text for c in row] for row in answers] == [["answer 0", "answer 1", "answer 2"]] * 6
    assert all((c.num_tokens, c.mean_logprob) == (2, -0.5) for row in answers for c in row)
    assert engine.counts["prompt_tokens"] == 42
    seeds = sorted(body["seed"] for body in server.asked)
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 20, "no shared draws"
    image = server.asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert image.startswith("data:image/jpeg;base64,")


def test_where_the_server_holds_the_seed_requests_carry_none(server, policy):
    opened(server, policy, seeds="engine").generate(requests(2), SAMPLING)
    assert not any("seed" in body for body in server.asked)


def test_a_server_of_vllm_is_told_not_to_use_the_policys_own_sampling(server, policy):
    opened(server, policy).generate(requests(1), SAMPLING)
    own = {key: server.asked[-1][key] for key in ("repetition_penalty", "top_k", "min_p")}
    assert own == {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}
    server.owner = "somebody"
    opened(server, policy).generate(requests(1), SAMPLING)
    assert "top_k" not in server.asked[-1]


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_an_answer_can_be_kept_to_given_letters(server, policy, owner):
    server.owner = owner
    asked = [replace(request, choices=("A", "B")) for request in requests(2)]
    server.content = "B" if owner == "vllm" else '{"option": "B"}'
    answers = opened(server, policy).generate(asked, replace(SAMPLING, n=1))
    assert [row[0].text for row in answers] == ["B", "B"]
    if owner == "vllm":
        assert server.asked[-1]["structured_outputs"] == {"choice": ["A", "B"]}
        return
    schema = server.asked[-1]["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["option"]["enum"] == ["A", "B"]
    server.content = "whatever"  # of a server that took no notice; it is no letter, and so wrong
    answers = opened(server, policy).generate(asked, replace(SAMPLING, n=1))
    assert [row[0].text for row in answers] == ["whatever"] * 2


def test_what_passes_is_tried_again(server, policy):
    server.statuses = [503, 429, 500]
    answers = opened(server, policy).generate(requests(1), SAMPLING)
    assert len(answers[0]) == 3
    assert len(server.asked) == 4


def test_a_server_that_is_away_for_a_while_is_waited_for(server, policy, monkeypatch, capsys):
    monkeypatch.setattr("tasks.engines.server.PAUSE", 0.01)
    engine = opened(server, policy)
    server.statuses = [502] * 20  # of a proxy before it; the client itself tries six times
    assert len(engine.generate(requests(2), SAMPLING)) == 2
    assert len(server.asked) == 22
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    there, engine._client = engine._client, engine._client.copy(base_url=nobody)
    back = threading.Timer(0.3, lambda: setattr(engine, "_client", there))
    back.start()
    assert len(engine.generate(requests(2), SAMPLING)) == 2
    said = capsys.readouterr().err
    assert said.count("the server does not answer (Error code: 502") == 1
    assert said.count("the server does not answer (Connection error") == 1


def test_but_not_for_ever(server, policy, monkeypatch):
    monkeypatch.setattr("tasks.engines.server.PAUSE", 0.01)
    monkeypatch.setattr("tasks.engines.server.PATIENCE", 0.2)
    engine = opened(server, policy)
    server.statuses = [503] * 999
    with pytest.raises(EngineDied, match=r"the server gave up: .*503"):
        engine.generate(requests(1), SAMPLING)


@pytest.mark.parametrize(
    ("status", "error", "told"),
    [
        (400, ValueError, "status 400"),
        (413, ValueError, "status 413"),
        (401, StageError, "the server will not answer: .*status 401"),
        (500, EngineDied, "the server gave up: .*status 500"),
    ],
)
def test_each_refusal_means_what_it_says_and_repeats_no_key(
    server, policy, monkeypatch, status, error, told
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    server.statuses = [status] * 99
    with pytest.raises(error, match=told) as caught:
        opened(server, policy).generate(requests(1), SAMPLING)
    assert "Bearer ***" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_an_image_too_large_for_the_server_is_refused_and_the_others_answered(server, policy):
    server.large = "question 3"
    refused: dict[str, str] = {}
    answers = generate_or_refuse(opened(server, policy), requests(5), SAMPLING, refused)
    assert list(refused) == ["set/3"]
    assert "status 413" in refused["set/3"]
    assert [row[0].finish_reason for row in answers] == ["stop"] * 3 + [REFUSED] + ["stop"]


def test_the_image_that_the_check_is_refused_for_is_told_from_a_prompt_that_is_too_long(
    server, policy
):
    from training.model import tiny_policy

    tiny_policy.processor().save_pretrained(policy)
    tiny_policy.config().save_pretrained(policy)
    engine = opened(server, policy)
    for picture, kind, says in (
        (
            Image.new("RGB", (3000, 10)),
            ValueError,
            "absolute aspect ratio must be smaller than 200",
        ),
        (Image.new("RGB", (84, 84)), StageError, "the server refuses the longest prompt .set/0.: "),
    ):
        server.statuses = [400]
        with pytest.raises(kind, match=says):
            engine.check(Request("set/0", encoded(picture), "question"))


def test_a_server_of_another_policy_is_found_out(server, policy):
    server.root = "/somewhere/an-older-one"
    with pytest.raises(
        StageError, match=r"serves /somewhere/an-older-one, but the policy to ask is"
    ):
        opened(server, policy)
