"""Where prompts cannot be shared, transformers' own loop is asked for, and the random numbers stay."""

import pytest
import torch

from tasks.engines.shared_prompts import cache
from tasks.engines.shared_prompts.generation import SharedPrompts
from tests.engines.test_shared_prompts import PROMPTS, options, policy  # noqa: F401


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_beams": 2}, "beam_search is not sampling"),
        ({"use_cache": False}, "use_cache"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"cache_implementation": "static"}, "its cache is made of StaticLayer"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ],
)
def test_other_ways_to_generate_are_left_to_transformers(policy, changed, why):
    refused(policy, options(**changed), why)


def test_a_static_cache_of_the_models_own_options_is_none_that_was_asked_for(policy, monkeypatch):
    """Gemma 3 is published with one."""
    monkeypatch.setattr(policy.model.generation_config, "cache_implementation", "static")
    theirs = policy.model.generate(**policy.inputs, generation_config=options())
    assert torch.equal(policy.shared(options()).sequences, theirs[PROMPTS])


def refused(policy, config, why):
    lines = []
    shared = SharedPrompts(policy.model, lines.append)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in range(2):
        assert shared.generate(dict(policy.inputs), PROMPTS, generation_config=config) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert len(lines) == 1
    assert "qwen2_5_vl: " in lines[0]
    assert why in lines[0]
    assert policy.model.config.get_text_config()._attn_implementation == "sdpa"


def one_token_late(monkeypatch):
    """Completions do not see the prompt's last token."""
    attend = cache.SharedLayer.attend

    def wrong(self, *given):
        mask = torch.zeros(self.prefix.size(0), 1, 1, self.prefix.size(2))
        mask[..., -1] = -torch.inf
        self.mask = mask
        return attend(self, *given)

    monkeypatch.setattr(cache.SharedLayer, "attend", wrong)


def of_another(monkeypatch):
    """Rows follow other prompts than theirs."""
    flat = cache.Branches.flat
    monkeypatch.setattr(cache.Branches, "flat", lambda self, x: flat(self, x).flip(0))


def untouched(monkeypatch):
    """A model that looks at its keys itself."""
    monkeypatch.setattr(cache.SharedLayer, "update", lambda self, keys, values, *_: keys.foo)


@pytest.mark.parametrize("fault", [one_token_late, of_another, untouched])
def test_a_model_for_which_it_does_not_hold_is_found_out(policy, monkeypatch, fault):
    fault(monkeypatch)
    why = "has no attribute" if fault is untouched else "log-probabilities differ by"
    refused(policy, options(do_sample=True), why)


def test_lack_of_memory_is_no_fault_of_the_model(policy, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache.SharedLayer, "attend", full)
    shared = SharedPrompts(policy.model, print)
    with pytest.raises(torch.OutOfMemoryError):
        shared.generate(dict(policy.inputs), PROMPTS, generation_config=options())
    assert not shared.why_not
    assert policy.model.config.get_text_config()._attn_implementation == "sdpa"
