"""What of a model is trained, whether it fits, and what goes where: without a step of training."""

from types import SimpleNamespace

import pytest
import torch

from tasks.runtime.errors import StageError
from tests.conftest import settings_of
from training import round_rules
from training.loop import checkpoints, vllm_check
from training.model import loading, trainable
from training.model.tiny_policy import new_model
from training.resources import gpu_memory, needs
from training.settings import TrainSettings

GIB = 1 << 30


def estimate(policy, turns=2, place=None, options=None, **changed) -> gpu_memory.Estimate:
    """Of four completions of 500 tokens at a time, after prompts of as many."""
    given = {
        "dtype": "bfloat16", "num_generations": 4, "questions_per_step": turns, "micro_batch_size": 4,
        "max_completion_length": 500, "shared_prefix": False,
    }  # fmt: skip
    trl = {"beta": 0.04, "optim": "adamw_torch", "gradient_checkpointing": True}
    trl |= {"steps_per_generation": 1, **(options or {})}
    settings = settings_of(TrainSettings, **{**given, **changed})
    place = place or needs.Place()
    return gpu_memory.of_gpu(needs.Asked(policy, (500, 0), settings, needs.Options.of(trl), place))


@pytest.fixture
def policy(tmp_path):
    new_model(0).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_parts_are_asked_of_the_model_and_cover_it():
    model = new_model(0)
    belongs = trainable.part_of(model)
    assert set(belongs) == {name for name, _ in model.named_parameters()}
    for name, part in belongs.items():
        expected = "projector" if "merger" in name else "vision" if "visual" in name else "language"
        assert part == expected, name


@pytest.mark.parametrize(
    ("setting", "read"),
    [("none", ()), ("", ()), ("vision", ("vision",)), ("language, vision", ("vision", "language"))],
)
def test_parts_are_read_from_a_setting(setting, read):
    assert settings_of(TrainSettings, freeze=setting).frozen == read


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"freeze": "eyes"}, "freeze must name some of none, vision, projector, language; got 'eyes'"),
        ({"freeze": "none vision"}, "freeze must be none, or parts; got 'none vision'"),
        ({"freeze": "vision projector language"}, "nothing is left to train"),
        ({"freeze": "vision", "lora_rank": 4}, "lora_targets says which"),
        ({"lora_rank": 4, "lora_targets": ""}, "lora_targets names no part"),
        ({"lora_targets": "none"}, "lora_targets must name some of vision, .*; got 'none'"),
        ({"quantize": "nf4"}, "needs adapters to train"),
        ({"quantize": "int3", "lora_rank": 4}, "quantize must be none or nf4"),
    ],
)  # fmt: skip
def test_settings_that_train_nothing_or_exclude_each_other_are_refused(changed, why):
    with pytest.raises(StageError, match=rf"\[Train\] .*{why}"):
        settings_of(TrainSettings, **changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_weights_are_quantised_on_a_gpu_alone(policy):
    settings = settings_of(TrainSettings, quantize="nf4", lora_rank=4)
    with pytest.raises(StageError, match="needs a GPU"):
        loading.load_model(policy, settings)


def test_a_changed_frozen_weight_changes_the_hash():
    model = new_model(0)
    trainable.freeze(model, ("vision",))
    before = trainable.frozen_hash(model)
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    trained = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        trained.flatten()[0] += 1
        assert trainable.frozen_hash(model) == before
        frozen.flatten()[-1] += 1e-6
    assert trainable.frozen_hash(model) != before


def test_drift_of_the_base_under_merging_is_measured_and_undone():
    from peft import get_peft_model

    config = trainable.lora_config(
        new_model(0), rank=4, alpha=8, dropout=0.0, targets=trainable.PARTS
    )
    model = get_peft_model(new_model(0).bfloat16(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    keeper, before = trainable.BaseKeeper(model), trainable.frozen_hash(model)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert trainable.frozen_hash(model) != before
    assert keeper.restore() > 1e-5
    assert trainable.frozen_hash(model) == before
    assert keeper.restore() == 0.0


def test_the_memory_of_weights_and_states_is_exact(policy):
    count = sum(p.numel() for p in new_model(0).parameters())
    full = estimate(policy)
    # Held in float32 and computed in bfloat16; the reference model only computes.
    assert full.weights == full.gradients == 4 * count
    assert full.reference == 2 * count
    assert full.optimizer == 8 * count
    assert estimate(policy, dtype="float32").certain == 20 * count
    assert estimate(policy, options={"optim": "adamw_8bit"}).optimizer == 2 * count
    quarter = estimate(policy, place=needs.Place(4, sharding="fsdp"))
    for part in ("weights", "gradients", "optimizer", "reference"):
        assert getattr(quarter, part) == getattr(full, part) / 4
    assert full.copies == 2 * count, "autocast rounds every weight for the length of a pass"
    assert estimate(policy, turns=1).copies == 0, "gradients come where they were"
    assert estimate(policy, options={"beta": 0.0}).reference == 0
    lora = estimate(policy, lora_rank=4)
    from peft import get_peft_model

    config = trainable.lora_config(new_model(0), rank=4, alpha=8, dropout=0, targets=("language",))
    adapted = get_peft_model(new_model(0), config)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert lora.weights == 2 * count + 4 * trained
    assert lora.copies == 0
    assert lora.gradients == 4 * trained
    assert lora.reference == 0
    language = estimate(policy, freeze="vision projector")
    assert language.gradients < full.gradients
    assert (
        estimate(policy, options={"gradient_checkpointing": False}).activations
        > 2 * full.activations
    )
    known = (
        "Qwen/Qwen2.5-VL-3B-Instruct"  # of 36 layers, where that one of four is recomputed above
    )
    whole, recomputed = (
        estimate(known, options={"gradient_checkpointing": c}).activations for c in (False, True)
    )
    assert whole > 5 * recomputed


def test_what_cannot_fit_is_refused_with_what_helps_and_what_may_not_is_told(policy, capsys):
    needed = estimate(policy)
    with pytest.raises(StageError, match=r"needs at least .* GiB a process .* LoRA"):
        gpu_memory.check(needed, needed.certain * 0.9)
    capsys.readouterr()
    gpu_memory.check(needed, needed.total)
    assert "may be too much" in capsys.readouterr().out
    gpu_memory.check(needed, 100 * GIB)
    assert "may be too much" not in capsys.readouterr().out
    assert 0 < gpu_memory.available_memory() < 1 << 45


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, None),
        ({"num_iterations": 2, "save_steps": 1}, "save_steps = 1 .* multiple of 2"),
        ({"num_iterations": 2, "steps": 5}, "steps = 5 .* multiple of 2"),
        ({"steps_per_generation": 8, "watch_every": 3}, "watch_every = 3 .* multiple of 2"),
        ({"generation_batch_size": 32, "watch_every": 3}, "watch_every = 3 .* multiple of 2"),
        ({"steps_per_generation": 2, "save_steps": 1}, "steps_per_generation = 2 would .* to 4 or"),
        (
            {"generation_batch_size": 18},
            "18 completions .* whole micro-batches of 4 .* set it to 16",
        ),
        ({"generation_batch_size": 2}, "2 completions .* whole micro-batches of 4 .* set it to 16"),
        (
            {"steps_per_generation": 5, "micro_batch_size": 2},
            "10 completions .* whole groups of 4; set it to 8",
        ),
        ({"generation_batch_size": 16, "steps_per_generation": 4}, "leave one out"),
        ({"generation_batch_size": 8}, "generation_batch_size = 8 would .* set it to 16 or more"),
    ],
)
def test_checkpoints_must_fall_on_a_boundary_of_generation(settings, refused):
    trl = {"num_iterations", "steps_per_generation", "generation_batch_size"} & settings.keys()
    given = {"save_steps": 10, "steps": 20, "watch_every": 0, **settings}
    given["trl"] = {name: given.pop(name) for name in trl}
    batch = {"questions_per_step": 4, "num_generations": 4, "micro_batch_size": 4}
    train = settings_of(TrainSettings, **{**batch, **given})  # four micro-batches a step
    if refused is None:
        round_rules.check_batches(train, 1)
    else:
        with pytest.raises(StageError, match=refused):
            round_rules.check_batches(train, 1)


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    for step in (1, 2, 3, 10, 11):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("x")
        if step != 11:
            checkpoints.mark_complete(folder)
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-10"
    checkpoints.rotate(tmp_path, 2, {1})
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == [f"checkpoint-{step}" for step in (1, 10, 11, 3)]


class StubEngine:
    """vLLM's side of a trainer: counts hand-overs, and merges adapters as TRL does."""

    def __init__(self, model):
        self.model, self.synced, self.forgotten = model, 0, 0
        self.llm, self.mode = SimpleNamespace(llm_engine=self), "colocate"

    def sync_weights(self):
        self.synced += 1
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    def reset_encoder_cache(self):
        self.forgotten += 1


def test_hand_overs_to_vllm_leave_the_base_weights_alone():
    from collections import defaultdict

    from peft import get_peft_model

    config = trainable.lora_config(
        new_model(0), rank=4, alpha=8, dropout=0.0, targets=trainable.PARTS
    )
    model = get_peft_model(new_model(0).bfloat16(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    engine = StubEngine(model)
    trainer = SimpleNamespace(
        model=model,
        vllm_generation=engine,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(unwrap_model=lambda m: m),
    )
    before = trainable.frozen_hash(trainer.model)
    vllm_check.guard_sync(trainer)
    for _ in range(3):
        engine.sync_weights()
    assert trainable.frozen_hash(trainer.model) == before
    assert engine.forgotten == engine.synced == 3
    drift = trainer._metrics["train"]["base_drift"]
    assert len(drift) == 3
    assert all(share > 0 for share in drift)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's matrix product")
def test_last_hidden_states_reach_the_output_layer_in_one_piece(policy):
    """Else torch copies the layer's weights once a row, which adapters leave without a gradient."""
    model, _ = loading.load_model(policy, settings_of(TrainSettings, lora_rank=4))
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    ids = torch.ones(3, 5, dtype=torch.long)
    model(input_ids=ids, logits_to_keep=1)
    assert seen == [True]
