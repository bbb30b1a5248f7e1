"""Shared-prefix training: TRL's log-probabilities, gradients and weights, for less work."""

import hashlib
import inspect
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from tasks.run import StageError
from tests import prefix_models
from tests.prefix_models import GROUP, apart, questions, some_dead, told, trainer, weights
from training import first_batch, prefix_attention, prefix_batches, shared_vision
from training.prefix_attention import Layout, Span
from training.prefix_forward import packed, sharing
from training.shared_prefix import SharedPrefixTrainer

LOSSES = ["dapo", "grpo", "dr_grpo", "bnpo"]
# The methods of TRL that the trainer overrides, or on whose insides it relies.
TRL_SOURCES = {
    "_prepare_inputs": "f824e7fb0714",
    "_tokenize_prompts": "d2d27f7c9bfd",
    "_generate": "2a27fdf8f5e6",
    "_generate_single_turn": "e0f02e4fc094",
    "_generate_and_score_completions": "1fa48922792d",
    "_get_per_token_logps_and_entropies": "ea73c3909275",
    "_compute_loss": "80295546bbdb",
    "training_step": "9e18632f7dd8",
    "log": "1e7772819cc8",
}


# Which rows are forwarded together.

groups_and_lengths = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=6
)


def flat(lengths):
    groups = [group for group, own in enumerate(lengths) for _ in own]
    return groups, [length for own in lengths for length in own]


@given(groups_and_lengths, st.integers(0, 40), st.integers(1, 9))
def test_every_row_is_forwarded_once_and_within_the_bound(lengths, limit, prompt):
    groups, completions = flat(lengths)
    prompts = [prompt + group for group in groups]
    batches = prefix_batches.split(groups, range(len(groups)), prompts, completions, limit)
    assert [row for rows in batches for row in rows] == [
        row for row, length in enumerate(completions) if length
    ]
    for rows in batches if limit else []:
        tokens = sum({groups[row]: prompts[row] for row in rows}.values())
        tokens += sum(completions[row] for row in rows)
        assert tokens <= limit or len(rows) == 1


@given(groups_and_lengths, st.integers(30, 80))
def test_a_group_that_fits_is_not_cut(lengths, limit):
    groups, completions = flat(lengths)
    prompts = [4] * len(groups)
    batches = prefix_batches.split(groups, range(len(groups)), prompts, completions, limit)
    parts = Counter(group for rows in batches for group in {groups[row] for row in rows})
    for group, own in enumerate(lengths):
        if 4 + sum(own) <= limit:
            assert parts[group] <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms())
def test_shuffling_keeps_groups_together(sizes, random):
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    permutation = list(range(len(groups)))
    random.shuffle(permutation)
    rows = prefix_batches.shuffled(groups, permutation)
    assert sorted(rows) == sorted(permutation)
    changes = sum(groups[a] != groups[b] for a, b in itertools.pairwise(rows))
    assert changes == len(sizes) - 1
    assert groups[rows[0]] == groups[permutation[0]]


@given(groups_and_lengths)
def test_packed_tokens_are_those_of_the_rows(lengths):
    groups, completions = flat(lengths)
    rows = [row for row, length in enumerate(completions) if length]
    if not rows:
        return
    prompts, width = [2 + group for group in groups], 8
    ids = torch.arange(len(groups) * (width + 9)).view(len(groups), -1)
    pack = prefix_batches.pack(
        groups, rows, prompts, completions, width, width + 9, torch.device("cpu")
    )
    assert pack.length == sum(prompts[r] - 1 for r in {groups[r]: r for r in rows}.values()) + sum(
        completions
    )
    tokens, labels = ids.flatten()[pack.token], ids.flatten()[pack.label]
    assert torch.equal(labels[pack.scored], ids[:, width:].flatten()[pack.result])
    assert torch.equal(tokens[pack.scored], ids[:, width - 1 : -1].flatten()[pack.result])
    assert (pack.label >= 0).sum() == len(pack.scored) == sum(completions)


# Who sees whom.


def seen_by(spans, length):
    """The rule, spelt out token by token."""
    group, branch = [-1] * length, [0] * length
    for number, span in enumerate(spans):
        at = span.start + span.prefix
        group[span.start : span.stop] = [number] * (span.stop - span.start)
        for index, size in enumerate(span.branches):
            branch[at : at + size] = [index + 1] * size
            at += size
    return torch.tensor(
        [
            [group[a] == group[b] and b <= a and branch[b] in (0, branch[a]) for b in range(length)]
            for a in range(length)
        ]
    )


SPANS = [Span(0, 5, (3, 1, 4)), Span(13, 0, (2, 2)), Span(17, 6, (7,))]


def test_attention_is_that_of_the_rule():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen_by(SPANS, 30), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    layout = Layout(SPANS, 30, torch.device("cpu"))
    found, _ = prefix_attention.attention(torch.nn.Module(), query, key, value, layout, 0.3)
    assert torch.allclose(found, expected, atol=1e-6)
    ours, theirs = (
        torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (found, expected)
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_mask_for_a_gpu_is_that_of_the_rule():
    mask = prefix_attention._block_mask(SPANS, 128, torch.device("cpu"), compiled=False)
    tokens = torch.arange(128)
    seen = mask.mask_mod(0, 0, tokens[:, None], tokens[None])
    assert torch.equal(seen[:30, :30], seen_by(SPANS, 30))
    assert not seen[30:, :30].any()
    assert not seen[:30, 30:].any()
    assert seen.diagonal().all()  # a token that sees nothing would make the softmax NaN


def test_trl_is_the_version_whose_insides_are_overridden():
    """A new TRL needs the trainer read against it; then put the new digests here."""
    assert trl.__version__ == "1.16.0"
    found = {
        name: hashlib.sha256(inspect.getsource(getattr(GRPOTrainer, name)).encode()).hexdigest()[
            :12
        ]
        for name in TRL_SOURCES
    }
    assert found == TRL_SOURCES


# What a batch comes to, beside TRL's own.


@pytest.fixture(autouse=True)
def one_thread():
    """So small a model is slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return prefix_models.write_policy(tmp_path_factory.mktemp("policy"))


def lora(**changed):
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "qkv"], **changed
    )


def wake(trainer):
    """LoRA's second matrices start at zero, where half of the gradients vanish."""
    torch.manual_seed(5)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)


def slot_of(trainer, count=4, dead=(), seed=0):
    """A generated batch as one turn of the loss: ragged completions, some groups without advantage."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in questions(count) for _ in range(GROUP)]
    batch = trainer._generate_and_score_completions(rows)
    draw = torch.Generator().manual_seed(seed)
    width = batch["completion_ids"].size(1)
    lengths = torch.randint(1, width + 1, (len(rows), 1), generator=draw)
    batch["completion_mask"] = (torch.arange(width)[None] < lengths).long()
    batch["completion_ids"] = batch["completion_ids"] * batch["completion_mask"]
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    batch["advantages"] = torch.randn(len(rows), generator=draw)
    for group in dead:
        batch["advantages"][group * GROUP : (group + 1) * GROUP] = 0
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        if key in batch:  # as if the policy had moved since
            noise = torch.randn(batch[key].shape, generator=draw)
            batch[key] = (batch[key] + 0.3 * noise) * batch["completion_mask"]
    return trainer._slot(batch, range(len(rows)))


def as_trl(trainer, slot):
    """The same turn as TRL's own code takes it: an image for each row."""
    rows = trainer._rows(slot, slot["groups"])
    return {**slot, **rows.by_row(range(len(slot["groups"])))}


def gradients(trainer, loss):
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def same_gradients(trainer, stock, slot, bound=1e-5):
    """Loss and gradients of a turn, here and by TRL's own trainer; gives both."""
    ours = trainer._compute_loss(trainer.model, slot)
    mine = gradients_after(trainer, ours)
    theirs = GRPOTrainer._compute_loss(stock, stock.model, as_trl(trainer, slot))
    other = gradients(stock, theirs)
    norm = torch.cat([g.flatten() for g in other.values()]).norm()
    assert norm > 0
    assert abs(ours.item() - theirs.item()) < bound
    for name, gradient in other.items():
        assert float((mine[name] - gradient).abs().max()) < bound * max(1.0, float(norm)), name
    return mine, other


def gradients_after(trainer, loss):
    """Those of a loss whose first micro-batches went backward while it was computed."""
    loss.backward()
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad(set_to_none=True)
    return found


def pair(policy, tmp_path, **given):
    """A trainer and TRL's, on equal weights."""
    ours = trainer(policy, tmp_path / "ours", **given)
    given = {k: v for k, v in given.items() if k not in ("tokens", "check")}
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    for one in (ours, stock):
        one.current_gradient_accumulation_steps = 1
        one.model.train()
    assert isinstance(ours, SharedPrefixTrainer)
    assert type(stock) is GRPOTrainer
    return ours, stock


@pytest.mark.model
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_are_those_of_trl(policy, tmp_path, tuning, checkpointing):
    """fp32, ragged completions, several groups: within 1e-5."""
    given = {"peft_config": lora()} if tuning == "lora" else {}
    ours, stock = pair(policy, tmp_path, gradient_checkpointing=checkpointing, beta=0.1, **given)
    for one in (ours, stock):
        wake(one)
    slot = slot_of(ours)
    rows = ours._rows(slot, slot["groups"])
    found = packed(ours.model, rows, range(len(rows.groups)))
    logps, entropies, _ = GRPOTrainer._get_per_token_logps_and_entropies(
        stock, stock.model, rows.input_ids, rows.attention_mask, rows.keep, compute_entropy=True,
        **rows.by_row(range(len(rows.groups))),
    )  # fmt: skip
    counted = slot["completion_mask"].flatten().nonzero().squeeze(1)
    assert torch.equal(found.place.sort().values, counted)
    assert float((logps.flatten()[found.place] - found.logps).detach().abs().max()) < 1e-5
    assert float((entropies.flatten()[found.place] - found.entropies).detach().abs().max()) < 1e-5
    same_gradients(ours, stock, slot)


@pytest.mark.model
def test_every_loss_and_every_way_to_split_it_has_the_gradient_of_trl(policy, tmp_path):
    """Groups without advantage count in the norm of the loss, and are not forwarded."""
    ours, stock = pair(policy, tmp_path)
    slot = slot_of(ours, dead=(1,))
    old = slot["advantages"].new_full(slot["completion_mask"].shape, -5.0)
    for loss in LOSSES:
        for tokens in (0, 60):
            for seen in (slot, {**slot, "old_per_token_logps": old}):
                ours.loss_type = stock.loss_type = loss
                ours.tokens_per_micro_batch = tokens
                rows = ours._rows(slot, slot["groups"])
                live = [r for r, group in enumerate(rows.groups) if group != 1]
                turn = {**seen, "micro_batches": ours._micro_batches(rows, live)}
                assert len(turn["micro_batches"]) == (1 if tokens == 0 else 3)
                ours._metrics["train"].clear()
                stock._metrics["train"].clear()
                same_gradients(ours, stock, turn)
                for name in ("clip_ratio/region_mean", "clip_ratio/low_min"):
                    one, other = (t._metrics["train"][name] for t in (ours, stock))
                    assert one == pytest.approx(other, abs=1e-6)
    assert ours.counters.zero_advantage_groups_forwarded == 0


@pytest.mark.model
def test_a_group_without_advantage_is_forwarded_for_the_sake_of_the_kl_term(policy, tmp_path):
    ours, stock = pair(policy, tmp_path, beta=0.5)
    slot = slot_of(ours, dead=(0, 1, 2, 3))
    mine, _ = same_gradients(ours, stock, slot)  # whose norm is not zero
    assert any(gradient.any() for gradient in mine.values())
    assert ours.counters.zero_advantage_groups_forwarded == 4
    for one in (ours, stock):
        one._metrics["train"].clear()
    same_gradients(ours, stock, slot)
    for name in ("kl", "entropy"):
        one, other = (t._metrics["train"][name] for t in (ours, stock))
        assert one == pytest.approx(other, abs=1e-5)


# What a run comes to.


@pytest.mark.model
def test_twenty_steps_give_the_weights_of_trl(policy, tmp_path):
    """Same seed, on the CPU: rewards equal, weights within 1e-4. The counters of the run."""
    ours = trainer(policy, tmp_path / "ours", max_steps=20, rows=80, reward=some_dead)
    images = Counter()
    real = ours.processing_class.image_processor
    spy = Spy(real, images)
    ours.processing_class.image_processor = spy
    ours.train()
    ours.processing_class.image_processor = real
    stock = trainer(
        policy, tmp_path / "stock", shared=False, max_steps=20, rows=80, reward=some_dead
    )
    patches = Counter()
    stock.model.model.visual.register_forward_pre_hook(
        lambda _m, args, _k: patches.update(n=len(args[0]) * stock.model.training), with_kwargs=True
    )
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert len(told(ours, "reward")) == 20
    assert apart(weights(ours), weights(stock)) < 1e-4
    found = ours.counters
    assert found.groups == 80
    assert found.zero_advantage_groups > 20
    assert found.zero_advantage_groups_forwarded == 0
    ideal_saving = found.lm_tokens_stock - found.lm_tokens_ideal
    assert found.lm_tokens_stock - found.lm_tokens >= 0.98 * ideal_saving > 0
    assert found.completion_tokens_useful >= 0.95 * found.completion_tokens_forwarded
    assert found.image_processor_calls <= found.unique_images == 80
    assert max(images.values()) == 1
    assert told(ours, "shared/useful_share") == [1.0] * 20
    assert sum(told(ours, "shared/groups")) == 80


class Spy:
    """An image processor that counts how often it was given each picture."""

    def __init__(self, real, seen):
        self.real, self.seen = real, seen

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, images, *args, **kwargs):
        self.seen.update(image.tobytes() for image in shared_vision._flat(images))
        return self.real(images, *args, **kwargs)


@pytest.mark.model
def test_an_image_is_encoded_once_a_group(policy, tmp_path):
    ours, stock = pair(policy, tmp_path)
    slot = slot_of(ours)
    seen = {}
    for one, turn in ((ours, slot), (stock, as_trl(ours, slot))):
        count = seen[one] = Counter()
        one.model.model.visual.register_forward_pre_hook(
            lambda _m, args, _k, count=count: count.update(n=len(args[0])), with_kwargs=True
        )
        one._compute_loss(one.model, turn)
    ours._unchecked = False
    seen[ours].clear()
    ours._compute_loss(ours.model, slot)
    assert seen[ours]["n"] * GROUP == seen[stock]["n"]


@pytest.mark.model
@pytest.mark.parametrize(
    "config",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    ],
)
def test_training_in_turns_gives_the_weights_of_trl(policy, tmp_path, config):
    given = {"max_steps": 4, "rows": 16, "reward": some_dead, **config}
    ours = trainer(policy, tmp_path / "ours", tokens=100, **given)
    passes = without_gradient(ours)
    ours.train()
    stock = trainer(policy, tmp_path / "stock", shared=False, **given)
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    # With iterations over one batch the first turn finds the old log-probabilities by itself.
    assert not passes


def without_gradient(trainer):
    """A list that grows with each forward pass of the trainer's that is for values only."""
    passes, forward = [], trainer._forward

    def watched(*args):
        if not torch.is_grad_enabled():
            passes.append(1)
        return forward(*args)

    trainer._forward = watched
    return passes


@pytest.mark.model
def test_old_log_probabilities_take_a_pass_where_weights_change_in_between(policy, tmp_path):
    ours = trainer(policy, tmp_path, steps_per_generation=2, per_device_train_batch_size=8)
    passes = without_gradient(ours)
    ours.train()
    assert len(passes) == 2  # one for each micro-batch of the one generation


@pytest.mark.model
@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_the_correction_for_vllm_is_that_of_trl_without_a_pass_of_its_own(policy, tmp_path, mode):
    """With log-probabilities as vLLM might have told them; micro-batches, and two iterations."""
    given = {"max_steps": 4, "rows": 16, "reward": some_dead, "num_iterations": 2}
    given |= {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    found = []
    for shared in (True, False):
        one = trainer(policy, tmp_path / str(shared), shared=shared, tokens=100, **given)
        passes = without_gradient(one) if shared else None
        as_if_by_vllm(one)
        one.train()
        found.append(one)
    ours, stock = found
    assert not passes
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    for figure in ("sampling_logp_difference/mean", "importance_sampling_ratio/max"):
        assert told(ours, f"sampling/{figure}")  # over forwarded tokens, where TRL has all


def as_if_by_vllm(trainer):
    """Generation by transformers, with log-probabilities of its own making."""
    trainer.vllm_importance_sampling_correction = True
    trainer._corrects = trainer._spares_old_pass = True
    generate = trainer._generate_single_turn
    trainer._last_loaded_step = 0

    def generated(ids, images, fields, count):
        trainer.use_vllm = False
        completions, _ = generate(ids, images, fields, count)
        trainer.use_vllm = True
        draw = torch.Generator().manual_seed(sum(map(sum, completions)))
        return completions, [
            [-6.9 + 0.05 * torch.randn((), generator=draw).item() for _ in own]
            for own in completions
        ]

    trainer._generate_single_turn = generated
    real = trainer._tokenize_prompts

    def tokenized(prompts):
        trainer.use_vllm = False  # which takes images, where transformers takes pixels
        try:
            return real(prompts)
        finally:
            trainer.use_vllm = True

    trainer._tokenize_prompts = tokenized
    trainer.use_vllm = True


@pytest.mark.model
def test_a_batch_without_any_advantage_moves_the_weights_as_with_trl(policy, tmp_path):
    """By momentum and decay alone."""
    calls = Counter()

    def reward(completions, **_):
        calls.update(n=1)
        return prefix_models.spread(completions) if calls["n"] == 1 else [1.0] * len(completions)

    after = []
    for shared in (True, False):
        calls.clear()
        one = trainer(
            policy, tmp_path / str(shared), shared=shared, reward=reward, weight_decay=0.1
        )
        one.train()
        after.append(weights(one))
        if shared:
            assert one.counters.zero_advantage_groups == 4
    assert apart(*after) < 1e-5


@pytest.mark.model
def test_equal_seeds_give_equal_bits_and_so_does_going_on(policy, tmp_path):
    """A run, the same again, and one that goes on from a checkpoint in the middle."""
    from transformers import AutoModelForImageTextToText

    given = {"max_steps": 4, "rows": 16, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(policy, tmp_path / "whole", **given)
    whole.train()
    again = trainer(policy, tmp_path / "again", **given)
    again.train()
    assert apart(weights(whole), weights(again)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert "shared_prefix" not in (checkpoint / "config.json").read_text()
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    rest = trainer(policy, tmp_path / "rest", model=model, **given)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert apart(weights(whole), weights(rest)) == 0


@pytest.mark.model
@pytest.mark.process
def test_two_processes_give_the_weights_of_trl(policy, tmp_path):
    """Processes with different numbers of groups to forward, one of them with none."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         "-m", "tests.prefix_models", str(policy), str(tmp_path)],
        cwd=Path(__file__).parent.parent, check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    ours, stock = (torch.load(tmp_path / f"{kind}.pt") for kind in ("shared", "stock"))
    assert apart(ours, stock) < 1e-4


# What may go wrong.


@pytest.mark.model
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_that_disagrees_with_trl_ends_on_its_first_batch(
    policy, tmp_path, monkeypatch, capsys, bf16
):
    """And one that differs by rounding does not."""
    trainer(policy, tmp_path / "right", max_steps=1, bf16=bf16).train()
    assert "agree on the first batch" in capsys.readouterr().out
    ours = trainer(policy, tmp_path / "wrong", bf16=bf16)
    monkeypatch.setattr("training.prefix_forward._positions", lambda *_: None)
    with pytest.raises(StageError, match=r"disagree on the first batch: log-.* gradients within"):
        ours.train()


@pytest.mark.model
def test_the_first_batch_is_checked_unless_told_not_to(policy, tmp_path, capsys):
    after = []
    for check in (True, False):
        one = trainer(policy, tmp_path / str(check), check=check)
        one.train()
        assert ("agree on the first batch" in capsys.readouterr().out) == check
        after.append(weights(one))
    assert apart(*after) == 0


def test_a_disagreement_says_by_how_much():
    layer = torch.nn.Linear(3, 4)
    mask = torch.ones(2, 4)
    x = torch.ones(2, 3)

    def compare(wrong, exact=True):
        return first_batch.compare(
            layer, wrong, lambda: (layer(x), mask), gradients=True, exact=exact
        )

    told = compare(lambda: (layer(x), mask))
    assert told.endswith("log-probabilities within 0.0e+00, gradients within 0.0e+00 of their norm")
    for wrong in (lambda: (layer(2 * x), mask), lambda: (layer(x) * torch.nan, mask)):
        with pytest.raises(StageError, match="shared_prefix = false"):
            compare(wrong)
    assert compare(lambda: (layer(x) * 1.01, mask), exact=False)
    assert layer.weight.grad is None


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


# Other architectures: images once, prompts with each completion.


def qwen3_vl(policy):
    """A Qwen3-VL, whose vision tower also feeds the first layers of the language model."""
    from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = AutoConfig.from_pretrained(policy)
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": ids.text_config.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **{n: getattr(ids, n) for n in names})
    )


@pytest.mark.model
def test_another_architecture_shares_its_images(policy, tmp_path, capsys):
    given = {"reward": some_dead, "max_steps": 3}
    ours = trainer(policy, tmp_path / "ours", model=qwen3_vl(policy), tokens=200, **given)
    assert "images are encoded once a group" in capsys.readouterr().out
    ours.train()
    assert "agree on the first batch" in capsys.readouterr().out
    stock = trainer(policy, tmp_path / "stock", model=qwen3_vl(policy), shared=False, **given)
    stock.train()
    assert told(ours, "reward") == told(stock, "reward")
    assert apart(weights(ours), weights(stock)) < 1e-4
    assert ours.counters.zero_advantage_groups_forwarded == 0 < ours.counters.zero_advantage_groups
    alive = ours.counters.groups - ours.counters.zero_advantage_groups
    assert ours.counters.vision_patches <= 24 * alive  # 56 x 84 pixels at most


@pytest.mark.model
def test_copies_of_an_image_are_encoded_once_and_pass_their_gradient_back():
    """Gemma 3: pixels a picture rather than patches, and one tensor of features."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 8}
    config = Gemma3Config(
        text_config=text | heads | {"sliding_window": 8},
        vision_config=vision | {"num_attention_heads": 2, "image_size": 16},
        mm_tokens_per_image=4, image_token_index=7,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    assert sharing(model) == ("vision", "gemma3, for which there is no shared prefix")
    ids = torch.tensor([[7] * 4 + [9, 10]] * 5)
    pixels = torch.randn(2, 3, 16, 16)[[0, 0, 0, 1, 1]]
    found = []
    encoder = None
    for shared in (False, True):
        if shared:
            encoder = shared_vision.ImagesOnce(model.base_model)
        model.zero_grad()
        logits = model(input_ids=ids, pixel_values=pixels).logits
        logits.square().sum().backward()
        gradient = model.model.vision_tower.get_parameter("embeddings.patch_embedding.weight").grad
        found.append((logits.detach(), gradient.clone()))
    assert encoder.patches == 2
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
