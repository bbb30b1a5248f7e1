"""[engine] max_pixels: proposals and evaluation may see larger images than training does."""

import io
from dataclasses import replace

import pytest
from PIL import Image

from tasks.engines.base import PromptBuilder, Request, Sampling
from tasks.runtime.errors import StageError
from tests import families
from tests.conftest import ROOT, settings_of
from tests.engines.conftest import SETTINGS
from tests.engines.test_server import opened, policy, requests, server  # noqa: F401  fixtures

SIDE = 28  # of a merged token
LARGE = 36 * SIDE**2  # pixels; the policy's own limit is 9 tokens
POLICY = ROOT / "training" / "base_policy"


@pytest.fixture
def request_() -> Request:
    buffer = io.BytesIO()
    Image.effect_noise((12 * SIDE, 12 * SIDE), 60).convert("RGB").save(buffer, "PNG")
    return Request("a/b", buffer.getvalue(), "What is this?")


def image_tokens(builder: PromptBuilder, request: Request) -> int:
    request = replace(request, decode=builder.decode)
    token = builder.processor.tokenizer.convert_tokens_to_ids(builder.placeholder)
    return builder.tokens(request).count(token)


def test_an_engine_reduces_images_to_its_own_limit_and_else_to_the_policys(request_):
    usual, large = PromptBuilder(POLICY), PromptBuilder(POLICY, max_pixels=LARGE)
    assert image_tokens(usual, request_) == 9
    assert image_tokens(large, request_) == 36
    assert usual.decode(request_.image).size == (3 * SIDE, 3 * SIDE)
    assert large.decode(request_.image).size == (6 * SIDE, 6 * SIDE)


def test_a_policy_with_an_image_size_of_its_own_has_no_such_limit(tmp_path):
    folder = families.gemma3(tmp_path / "policy", ["beetle"])
    PromptBuilder(folder)
    with pytest.raises(StageError, match=r"\[engine\] max_pixels = 28224 does nothing"):
        PromptBuilder(folder, max_pixels=LARGE)


def test_a_server_of_vllm_is_sent_the_limit_and_another_one_refused(server, policy):
    opened(server, policy).generate(requests(1), Sampling(1, 0.0, 1.0, 1.0, 8, 0))
    assert "mm_processor_kwargs" not in server.asked[-1]
    opened(server, policy, max_pixels=LARGE).generate(requests(1), Sampling(1, 0.0, 1.0, 1.0, 8, 0))
    assert server.asked[-1]["mm_processor_kwargs"] == {"max_pixels": LARGE}
    server.owner = "somebody"
    with pytest.raises(StageError, match="max_pixels cannot be sent to"):
        opened(server, policy, max_pixels=LARGE)


@pytest.mark.model
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_the_engines_themselves_see_the_larger_image(request_, backend):
    """vLLM's own count of a prompt's tokens is compared by its `check`."""
    from tasks.engines.backends import open_engine

    settings = replace(SETTINGS, backend=backend, max_pixels=LARGE)
    engine = open_engine(POLICY, settings)
    request = replace(request_, decode=engine.decode)
    engine.check(request)
    before = engine.counts["prompt_tokens"]
    engine.generate([request], Sampling(1, 0.0, 1.0, 1.0, 4, 0))
    expected = len(PromptBuilder(POLICY, max_pixels=LARGE).tokens(request))
    assert engine.counts["prompt_tokens"] - before == expected
    assert settings_of(type(settings)).max_pixels == 0
