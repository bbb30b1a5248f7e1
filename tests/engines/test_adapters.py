"""Policies that are adapters: small on the disk, made whole where they are asked."""

import json
import shutil

import pytest

from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import settings_of
from tests.training.test_grpo import arguments, curve, digest, frozen, trained, weights_of
from training.settings import Round, TrainSettings

pytestmark = pytest.mark.model
__all__ = ["frozen"]  # the fixture


@pytest.fixture(scope="module")
def adapted(frozen, tmp_path_factory):
    """A policy trained for two steps with adapters everywhere, below one root with its base."""
    root = tmp_path_factory.mktemp("adapted")
    shutil.copytree(frozen / "policy", root / "base")
    # End tokens as published models have them, where the tokenizer has one; and a repetition_penalty.
    told = {"eos_token_id": [2, 0], "pad_token_id": 0, "repetition_penalty": 1.05}
    (root / "base" / "generation_config.json").write_text(json.dumps(told))
    given = arguments(frozen, steps=2, lora_rank=4, lora_targets="vision projector language")
    given |= {"learning_rate": 1e-2, "base": root / "base", "policy": root / "base"}
    trained(root / "train", given)
    return root, given


def test_an_adapter_is_the_policy_and_is_made_whole_where_it_is_asked_for(adapted, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from tasks.engines import adapters
    from training.export import export

    root, _ = adapted
    folder = root / "train"
    assert not list(folder.glob("*.safetensors"))
    load = AutoModelForImageTextToText.from_pretrained
    base = PeftModel.from_pretrained(load(root / "base"), folder / "adapter")
    names = {name for name, _ in base.named_parameters() if "lora_" in name}
    for part in ("visual", "merger", "language_model"):
        assert any(part in name for name in names)
    export(folder, tmp_path / "whole")
    merged, saved = base.merge_and_unload(), load(tmp_path / "whole")
    for (name, one), (_, other) in zip(
        merged.named_parameters(), saved.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    text = (tmp_path / "whole" / "README.md").read_text()
    assert "PeftModel" in (folder / "README.md").read_text()
    assert "PeftModel" not in text
    assert "vLLM\nloads this folder" in text
    shutil.copytree(root, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "train" / "checkpoints")
    moved = adapters.adapter_stack(tmp_path / "moved" / "train")
    assert moved.base == (tmp_path / "moved" / "base").resolve()
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(StageError, match=f"is an adapter, and the model .* is not at {moved.base}"):
        adapters.adapter_stack(tmp_path / "moved" / "train")


def test_the_card_says_that_merged_weights_are_not_those_that_were_quantised(adapted, tmp_path):
    import data_cards
    from training.loop import policy_folder

    root, given = adapted
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.copytree(root / "base", tmp_path / "base")
    told = Round.of({**given, "base": tmp_path / "base"})
    for quantize, said in (("none", False), ("nf4", True)):
        settings = settings_of(TrainSettings, lora_rank=4, quantize=quantize)
        policy_folder.write_card(
            tmp_path / "train", [data_cards.load("few")], told, settings, log=[]
        )
        text = (tmp_path / "train" / "README.md").read_text()
        assert 'subfolder="adapter"' in text
        for card in (text, policy_folder.merged_card(text)):
            assert ("a sum that training did not see" in card) == said


def test_a_policy_stops_where_its_base_does(adapted, frozen, tmp_path, monkeypatch):
    from trl import GRPOTrainer

    root, given = adapted
    told = json.loads((root / "base" / "generation_config.json").read_text())
    ends = []
    update = GRPOTrainer.__init__

    def noted(self, *arguments, **named):
        update(self, *arguments, **named)
        ends.append(self.generation_config.eos_token_id)

    monkeypatch.setattr(GRPOTrainer, "__init__", noted)
    full = trained(tmp_path / "full", {**given, "lora_rank": 0, "lora_targets": ""})
    assert ends == [told["eos_token_id"]], "completions of training end where the policy's do"
    for policy in (full, root / "train"):
        assert json.loads((policy / "generation_config.json").read_text()) == told
    from training.loop import policy_folder
    from training.model.processors import load_processor

    checkpoint = full / "checkpoints" / "checkpoint-1"
    common = (checkpoint, load_processor(root / "base"), root / "base", "float32")
    policy_folder.from_checkpoint(tmp_path / "best", *common)
    assert json.loads((tmp_path / "best" / "generation_config.json").read_text()) == told
    weights = [folder / "model.safetensors" for folder in (tmp_path / "best", checkpoint)]
    assert weights[0].samefile(weights[1]), "the same file, not a copy"


def test_rounds_that_start_afresh_add_adapter_to_adapter(adapted, tmp_path):
    from tasks.engines import adapters
    from training.export import export

    root, given = adapted
    given = {**given, "rounds": 2, "carry_over": False}
    first = trained(tmp_path / "first", given)
    export(first, tmp_path / "whole")
    shutil.copyfile(first / "place.json", tmp_path / "whole" / "place.json")  # where to ask on
    rest = {**given, "refresh_round": 1}
    second = trained(tmp_path / "second", {**rest, "policy": first})
    other = trained(tmp_path / "other", {**rest, "policy": tmp_path / "whole"})
    assert curve(second) == curve(other), "as from whole weights"
    assert weights_of(second) == weights_of(other)
    found = adapters.adapter_stack(second)
    assert [path.name for path in found.adapters] == ["1", "adapter"]
    assert found.base == (root / "base").resolve()
    shutil.rmtree(first)
    for policy in (second, other):
        export(policy, tmp_path / f"{policy.name}-whole")
    weights = [digest(tmp_path / f"{n}-whole" / "model.safetensors") for n in ("second", "other")]
    assert weights[0] == weights[1]
    assert "earlier/1" in (second / "README.md").read_text()


def test_whoever_asks_an_adapter_asks_its_whole_weights_and_leaves_none_behind(
    adapted, frozen, tmp_path, monkeypatch
):
    from tasks.engines import adapters
    from tasks.engines.sampler import Sampler
    from tasks.engines.worker import Query
    from tasks.predict import Predictor
    from tasks.runtime.protocol import remove_scratch
    from tests import fakes
    from tests.conftest import ENGINE

    root, _ = adapted
    asked, fake = [], fakes.engine

    def engine(policy, settings):
        asked.append((policy, (policy / "model.safetensors").exists()))
        return fake(policy, settings)

    monkeypatch.setattr(fakes, "engine", engine)
    image_id = shards.read(frozen / "download", "images", ["image_id"])["image_id"][0].as_py()
    place = ([Query(image_id, "What is it?")], frozen / "download", 10, "")
    for times in (1, 2):
        with Sampler(root / "train", ENGINE, 2, 0) as sampler:
            sampler.run(tmp_path, f"rollouts{times}", *place)
    whole = tmp_path / "cache" / adapters.MERGED
    assert asked == [(whole, True)] * 2
    remove_scratch(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "rollouts1-00000.parquet",
        "rollouts2-00000.parquet",
    ]
    asked.clear()
    images = shards.read(frozen / "download", "images")["image"].to_pylist()
    with Predictor(root / "train", "few", engine=ENGINE) as predictor:
        predictor.predict([images[0]["bytes"]])
    ((policy, there),) = asked
    assert there
    assert not policy.exists()
