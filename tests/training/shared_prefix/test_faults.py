"""What may go wrong in the shared pass is told, and training goes on with TRL's; rounding is no fault."""

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tasks.runtime.errors import StageError
from tests import prefix_models
from tests.prefix_models import (
    Drawn,
    apart,
    trainer,
    weights,
)
from tests.training.shared_prefix.test_trainer import policy, slot_of  # noqa: F401
from training.shared_prefix import (
    attention,
    forward,
    packing,
)
from training.shared_prefix import (
    check as parity,
)
from training.shared_prefix.forward import sharing


def no_positions(monkeypatch):
    """Tokens of a completion stand behind one another, wherever their prompt ended."""
    monkeypatch.setattr("training.shared_prefix.forward._positions", lambda *_: None)


def one_further(monkeypatch):
    """Completions begin one position too late."""
    right = forward._positions

    def wrong(module, rows, chosen, pack):
        ahead = (pack.label >= 0).long()
        return right(module, rows, chosen, pack) + ahead[None, None]

    monkeypatch.setattr(forward, "_positions", wrong)


def leaking(monkeypatch):
    """The branches of a group are one: a completion sees those before it."""
    right = packing.Packed.layout

    def wrong(pack, device):
        spans = [attention.Span(s.start, s.prefix, (sum(s.branches),)) for s in pack.spans]
        return right(dataclasses.replace(pack, spans=spans), device)

    monkeypatch.setattr(packing.Packed, "layout", wrong)


@pytest.mark.model
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fault", [no_positions, one_further, leaking])
def test_a_fault_of_the_shared_pass_is_told_and_training_goes_on_with_trls(
    policy, tmp_path, monkeypatch, capsys, fault, bf16
):
    fault(monkeypatch)
    given = {"bf16": bf16, "tokens": 60, "max_steps": 2, "num_iterations": 2, "beta": 0.3}
    given["drawn"] = Drawn()
    ours = trainer(policy, tmp_path / "wrong", **given)
    ours.train()
    assert "warning: shared and separate forward passes disagree" in capsys.readouterr().out
    assert ours.falls_back
    assert ours.counters.completion_tokens_forwarded > 0
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    stock.train()
    assert apart(weights(ours), weights(stock)) < (1e-3 if bf16 else 1e-5)


@pytest.mark.model
def test_rounding_of_a_deep_net_in_16_bits_is_no_fault_and_half_a_nat_is(tmp_path, monkeypatch):
    """Eight random layers part by more than a tenth of a nat at the worst token."""
    deep = prefix_models.write_policy(tmp_path / "deep", layers=8)
    model = AutoModelForImageTextToText.from_pretrained(deep, dtype=torch.bfloat16)
    one = trainer(deep, tmp_path / "a", model=model, bf16=True, max_completion_length=40)
    rows = one._rows(slot := slot_of(one), slot["groups"])
    assert parity.agree(one, one.model, rows)
    right = parity.packed

    def shifted(*given):
        found = right(*given)
        return dataclasses.replace(found, logps=found.logps + 0.5)

    monkeypatch.setattr(parity, "packed", shifted)
    assert not parity.agree(one, one.model, rows)


@pytest.mark.model
def test_the_comparison_takes_two_rows_a_group_and_passes_over_a_full_memory(
    policy, tmp_path, monkeypatch, capsys
):
    one = trainer(policy, tmp_path / "a")
    rows = one._rows(slot := slot_of(one), slot["groups"])
    taken = []
    right = parity.packed

    def packed(model, rows, own):
        taken.append([rows.groups[row] for row in own])
        return right(model, rows, own)

    monkeypatch.setattr(parity, "packed", packed)
    assert parity.agree(one, one.model, rows)
    assert [Counter(groups) for groups in taken] == [{0: 2, 1: 2}]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    capsys.readouterr()
    monkeypatch.setattr(parity, "padded", full)
    assert parity.agree(one, one.model, rows)
    assert "not enough memory to compare" in capsys.readouterr().out


@pytest.mark.model
def test_the_first_batch_is_checked_unless_told_not_to(policy, tmp_path, capsys):
    after = []
    for check in (True, False):
        one = trainer(policy, tmp_path / str(check), check=check)
        one.train()
        assert ("agree on the first batch" in capsys.readouterr().out) == check
        after.append(weights(one))
    assert apart(*after) == 0


@pytest.mark.model
def test_what_can_be_shared_is_found_from_the_model(policy, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)
    assert sharing(model)[0] == "prefix"
    trainer(policy, tmp_path / "a", model=model)
    assert "go through the model once a group (qwen2_5_vl)" in capsys.readouterr().out
    eager = AutoModelForImageTextToText.from_pretrained(policy, attn_implementation="eager")
    assert sharing(eager) == (
        "vision", "qwen2_5_vl with attention eager; a shared prefix needs sdpa, all full"
    )  # fmt: skip
    eager.__class__.base_model = property(lambda _: torch.nn.Module())
    try:
        assert sharing(eager) == ("none", "qwen2_5_vl has no get_image_features")
    finally:
        del eager.__class__.base_model


@pytest.mark.model
def test_settings_that_do_not_go_together_are_refused(policy, tmp_path):
    with pytest.raises(StageError, match="tokens_per_micro_batch does not go with"):
        trainer(policy, tmp_path, tokens=100, entropy_coef=0.1)
