"""What of the model is trained: frozen parts stay, adapters over 4 bits move, small steps are kept."""

from dataclasses import replace

import pytest

from tests.conftest import run_stage
from tests.training.test_grpo import arguments, frozen, trained  # noqa: F401

pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({"freeze": "vision"}, {"projector", "language"}),
        ({"freeze": "language"}, {"vision", "projector"}),
        ({"freeze": "vision, projector"}, {"language"}),
    ],
)
def test_a_frozen_part_stays_as_it_is(frozen, tmp_path, capsys, changed, moves):
    from safetensors.torch import load_file

    from training.model.tiny_policy import new_model
    from training.model.trainable import part_of

    folder = trained(tmp_path / "out", arguments(frozen, steps=1, **changed))
    before = load_file(frozen / "policy" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    moved = {name for name in before if not (before[name] == after[name]).all()}
    parts = set()
    for name, part in part_of(new_model(0)).items():
        # saved under older names, without the first "model."
        if any(
            saved.endswith(name.removeprefix("model.").removeprefix("language_model."))
            for saved in moved
        ):
            parts.add(part)
    assert parts == moves
    assert " 0 of " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_adapters_over_quantised_weights_move_at_a_small_rate(
    frozen, tmp_path, monkeypatch, capsys, method
):
    import torch
    from safetensors.torch import load_file

    from training.grpo import grpo
    from training.model import loading, trainable
    from training.sft_baseline import sft_baseline

    def quantised(base, settings):
        model, adapters = loaded(base, replace(settings, quantize="none"))
        model.is_loaded_in_4bit = True  # all that TRL looks at
        model.num_parameters = lambda **_: 0  # for which bitsandbytes would be asked
        return model, adapters

    def moved(name: str) -> float:
        """The share of the adapters' first matrices that left bfloat16, where they began."""
        output = tmp_path / name
        output.mkdir()
        run_stage({"grpo": grpo, "sft": sft_baseline}[method], output, **given)
        weights = load_file(output / "adapter" / "adapter_model.safetensors")
        first = torch.cat([w.flatten() for key, w in weights.items() if "lora_A" in key])
        return (first.float() != first.bfloat16().float()).float().mean().item()

    loaded = loading.load_model
    monkeypatch.setattr(loading, "load_model", quantised)
    given = arguments(frozen, steps=2, lora_rank=4, learning_rate=1e-5, dtype="bfloat16")
    given |= {"quantize": "nf4"}
    assert moved("ours") > 0.9
    assert "full weights made of this policy are the unquantised base" in capsys.readouterr().out
    monkeypatch.setattr(trainable, "hold_in_float32", lambda model: None)
    assert moved("TRL's") == 0.0
