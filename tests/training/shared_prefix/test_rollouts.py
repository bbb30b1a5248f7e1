"""Rollouts in the trainer: TRL's tokens where nothing is random, each prompt computed once a group."""

import io
from collections import Counter

import pytest
import torch
from transformers import AutoModelForImageTextToText
from trl.data_utils import prepare_multimodal_messages

import data_cards
from tasks.engines.shared_prompts import cache
from tests.prefix_models import GROUP, questions, trainer
from tests.training.shared_prefix.test_trainer import lora, policy, wake  # noqa: F401
from training.loop.validation import Sample, Watch
from training.shared_prefix.forward import base_of

pytestmark = pytest.mark.model
GREEDY = {"do_sample": False, "no_repeat_ngram_size": 1}


def rollouts(one):
    """Completions of three questions, and the tokens and patches that went through the model."""
    one.model.train()
    torch.manual_seed(1)
    chats = [
        prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in questions(3)
    ]
    seen = Counter()
    inner = base_of(one.model).model

    def tokens(_module, _args, kwargs):
        rows, columns, _ = kwargs["inputs_embeds"].shape
        seen.update({"prefill" if columns > 1 else "decoded": rows * columns})

    hooks = [
        inner.visual.register_forward_pre_hook(lambda _m, args: seen.update(patches=len(args[0]))),
        inner.language_model.register_forward_pre_hook(tokens, with_kwargs=True),
    ]
    made = one._generate([chat for chat in chats for _ in range(GROUP)])[1]
    for hook in hooks:
        hook.remove()
    assert one.model.training
    assert "generate" not in vars(base_of(one.model))
    return made, seen


def pair(policy, tmp_path, **given):
    """A trainer that shares prompts, unchecked so that all it computes is counted, and TRL's own."""
    return [
        trainer(policy, tmp_path / name, shared=name == "ours", check=False, **given)
        for name in ("ours", "stock")
    ]


def test_greedy_completions_are_those_of_trl_at_a_group_th_of_the_prompts(policy, tmp_path):
    """One pass of the vision tower and one of the prompt for each group. Ended rows leave."""
    first, _ = rollouts(pair(policy, tmp_path, generation_kwargs=GREEDY)[0])
    ends = [2, first[0][2], first[GROUP][6]]
    ours, stock = pair(policy, tmp_path, generation_kwargs={**GREEDY, "eos_token_id": ends})
    for one in (ours, stock):
        one.eos_token_ids = ends
    (made, seen), (theirs, needed) = rollouts(ours), rollouts(stock)
    assert made == theirs
    assert len(set(map(len, made))) == 3
    assert seen["patches"] > 0
    assert needed["prefill"] == GROUP * seen["prefill"]
    assert seen["decoded"] == sum(len(ids) - 1 for ids in made) < needed["decoded"]
    # TRL's generation encodes each copy of an image.
    assert needed["patches"] == GROUP * seen["patches"]


def test_adapters_and_gradient_checkpointing_and_no_dropout(policy, tmp_path):
    """Rollouts are the policy's own, as vLLM's are, and not those of a net with dropout."""
    given = {"generation_kwargs": GREEDY}
    ours = trainer(policy, tmp_path / "a", peft_config=lora(lora_dropout=0.9), **given)
    stock = trainer(policy, tmp_path / "b", peft_config=lora(), shared=False, **given)
    for one in (ours, stock):
        wake(one)
        base_of(one.model).gradient_checkpointing_enable({"use_reentrant": False})
    assert rollouts(ours)[0] == rollouts(stock)[0]
    assert not ours.shared_prompts.why_not
    assert base_of(ours.model).is_gradient_checkpointing


def test_where_it_does_not_hold_trl_generates_with_the_same_random_numbers(
    policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cache.SharedLayer, "attend", lambda self, query, _: query.transpose(1, 2))
    ours = trainer(policy, tmp_path / "ours")
    stock = trainer(policy, tmp_path / "stock", shared=False)
    assert rollouts(ours)[0] == rollouts(stock)[0] == rollouts(ours)[0]
    printed = capsys.readouterr().out
    assert printed.count("each completion generates with a prompt of its own") == 1
    assert "qwen2_5_vl: log-probabilities differ by" in printed


def test_sharded_weights_generate_by_trl(policy, tmp_path, monkeypatch):
    ours, stock = pair(policy, tmp_path)
    ours.is_fsdp_enabled = True
    assert rollouts(ours)[0] == rollouts(stock)[0]
    ours.is_fsdp_enabled = False
    assert rollouts(ours)[0] != rollouts(stock)[0]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_val_images_are_answered_greedily_from_shared_prompts(
    policy, tmp_path, tuning, monkeypatch
):
    """Also below adapters, whose model has options of its own that sample."""
    given = {"peft_config": lora()} if tuning == "lora" else {}
    one = trainer(policy, tmp_path, **given)
    samples = []
    for number, row in enumerate(questions(3)):
        made = io.BytesIO()
        row["image"].save(made, "PNG")
        samples.append(Sample(str(number), 0, 0, made.getvalue()))
    watch = Watch(samples, [data_cards.load("beetles")], "brief", every=1, length=8)
    base = base_of(one.model)
    assert base.generation_config.do_sample
    one.model.train()
    shared = watch._by_model(one, samples)
    assert one.shared_prompts._unchecked is False
    assert one.model.training
    assert base.generation_config.do_sample
    assert shared == watch._by_model(one, samples)
    monkeypatch.setattr(type(one), "shared_prompts", None)
    assert shared == watch._by_model(one, samples)
    assert len(set(shared)) > 1


@pytest.mark.parametrize("mixed", [False, True])
def test_rounding_to_16_bits_is_no_fault(policy, tmp_path, mixed):
    """Of the weights, or of float32 weights in mixed precision."""
    dtype = torch.float32 if mixed else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(policy, dtype=dtype)
    one = trainer(policy, tmp_path, model=model, bf16=True, max_steps=1)
    one.train()
    assert not one.shared_prompts._unchecked
    assert not one.shared_prompts.why_not
