"""The transformers engine: by shared prompts or by `generate`, the same answers."""

import io
from dataclasses import replace

import pytest

from tasks.engines import transformers
from tasks.engines.base import Request, Sampling
from tasks.engines.shared_prompts import cache
from tasks.engines.transformers import TransformersEngine
from tests.conftest import ENGINE
from tests.prefix_models import questions, write_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy") / "policy")


@pytest.fixture(scope="module")
def requests():
    asked = []
    for number, row in enumerate(questions(5)):
        made = io.BytesIO()
        row["image"].save(made, "PNG")
        asked.append(Request(str(number), made.getvalue(), row["prompt"][0]["content"]))
    return asked


def engine(policy):
    return TransformersEngine(policy, replace(ENGINE, backend="transformers"))


def sampling(n=1, temperature=0.0):
    return Sampling(n, temperature, 0.9, 1.2, 12, seed=3)


def broken(monkeypatch):
    """The shared attention is wrong, as it may be for an architecture that nobody tried."""
    monkeypatch.setattr(cache.SharedLayer, "attend", lambda self, query, _: query.transpose(1, 2))


def test_by_generate_the_answers_are_the_same(policy, requests, monkeypatch, capsys):
    """Greedily; the batch at which sharing fails is asked again, and counted once."""
    ours = engine(policy)
    shared = ours.generate(requests, sampling())
    assert not ours._shared.why_not
    broken(monkeypatch)
    theirs = engine(policy)
    answers = theirs.generate(requests, sampling())
    assert "each completion generates with a prompt of its own" in capsys.readouterr().out
    assert ours.counts == theirs.counts
    for one, other in zip(shared, answers, strict=True):
        assert one[0].text == other[0].text
        assert one[0].num_tokens == other[0].num_tokens
        assert one[0].mean_logprob == pytest.approx(other[0].mean_logprob, abs=1e-5)
    assert len({row[0].text for row in shared}) > 1


@pytest.mark.parametrize("fault", [False, True])
def test_samples_come_in_as_many_rounds_as_memory_takes(policy, requests, monkeypatch, fault):
    if fault:
        broken(monkeypatch)
    ours = engine(policy)
    whole = ours.generate(requests, sampling(4, 1.0))
    assert whole == ours.generate(requests, sampling(4, 1.0))
    shapes = []
    batch = TransformersEngine._batch

    def seen(self, asked, given):
        shapes.append((len(asked), given.n))
        return batch(self, asked, given)

    monkeypatch.setattr(TransformersEngine, "_batch", seen)
    monkeypatch.setattr(transformers, "MEMORY", 9 * ours._bytes(12))
    assert [len(row) for row in ours.generate(requests, sampling(4, 1.0))] == [4] * 5
    monkeypatch.setattr(transformers, "MEMORY", 3 * ours._bytes(12))
    rows = ours.generate(requests[:1], sampling(4, 1.0))
    assert len({completion.text for completion in rows[0]}) == 4
    assert shapes == [(2, 4), (2, 4), (1, 4), (1, 3), (1, 1)]
