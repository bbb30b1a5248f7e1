"""A published model as base policy: its weights are linked where nothing changes, and stay as they are."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline.artifacts import store
from tasks.runtime.errors import StageError
from tests.conftest import ROOT, as_config, run_stage
from training import adopt
from training.model import tiny_policy

pytestmark = pytest.mark.model
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
ENDS = {"eos_token_id": [2, 0], "repetition_penalty": 1.05, "pad_token_id": 0, "temperature": 1e-6}


@pytest.fixture
def model(tmp_path) -> Path:
    """A model's folder in several files, with decoding defaults as a published one has them."""
    folder = tmp_path / "model"
    made, processor = tiny_policy.build(["beetle"], seed=3)
    made.save_pretrained(folder, max_shard_size="2MB")
    processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(ENDS))
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def adopted(folder: Path, model: Path | str, dtype: str = "float32") -> Path:
    folder.mkdir(parents=True)
    run_stage(adopt.adopt, folder, model=str(model), dtype=dtype, **PIXELS)
    return folder


def same_file(one: Path, other: Path) -> bool:
    return one.stat().st_ino == other.stat().st_ino


def test_weights_become_links_and_no_model_is_loaded(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    made = adopted(tmp_path / "made", model)
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    assert sorted(path.name for path in made.glob("*.safetensors")) == weights
    assert all(same_file(made / name, model / name) for name in weights)
    assert not same_file(made / "config.json", model / "config.json")
    assert json.loads((made / "generation_config.json").read_text()) == ENDS
    assert "of them as hard links" in capsys.readouterr().out
    size = AutoProcessor.from_pretrained(made).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == tuple(PIXELS.values())
    monkeypatch.undo()
    loaded, whole = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (made, model)
    )
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_a_frozen_artifact_leaves_the_model_it_was_linked_from_writable(model, tmp_path):
    partial = adopted(tmp_path / "artifacts" / "abc.partial", model)
    modes = {path.name: path.stat().st_mode for path in model.iterdir()}
    folder = tmp_path / "artifacts" / "abc"
    store.commit(partial, folder, {"stage": "BasePolicy", "fingerprint": "abc"})
    assert {path.name: path.stat().st_mode for path in model.iterdir()} == modes
    assert not (folder / "config.json").stat().st_mode & stat.S_IWUSR
    store.remove(folder)
    assert {path.name: path.stat().st_mode for path in model.iterdir()} == modes
    assert AutoModelForImageTextToText.from_pretrained(model)


def test_where_no_link_can_be_weights_are_copied(model, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made = adopted(tmp_path / "made", model)
    for path in model.glob("*.safetensors*"):
        assert (made / path.name).read_bytes() == path.read_bytes()
        assert not same_file(made / path.name, path)


def test_in_another_precision_weights_are_written_anew(model, tmp_path):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    made = adopted(tmp_path / "made", model, "bfloat16")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert {t.dtype for t in load_file(made / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((made / "generation_config.json").read_text()) == ENDS


def test_what_is_no_such_model_is_told_in_one_sentence(model, tmp_path):
    with pytest.raises(StageError, match=r"\[BasePolicy\] model = nowhere/at_all cannot be loaded"):
        adopted(tmp_path / "none", "nowhere/at_all")
    config = json.loads((model / "config.json").read_text())
    text = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(text))
    with pytest.raises(StageError, match="no model that takes images"):
        adopted(tmp_path / "text", model)
    (model / "config.json").write_text(json.dumps(config))
    torn = sorted(model.glob("*.safetensors"))[0]
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(StageError, match="cannot be loaded"):
        adopted(tmp_path / "torn", model)


@pytest.mark.process
def test_a_model_in_the_hubs_cache_is_linked_by_its_content(model, tmp_path):
    cache = tmp_path / "home" / "hub" / "models--me--policy"
    snapshot = cache / "snapshots" / ("a" * 40)
    for folder in (cache / "blobs", cache / "refs", snapshot):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    given = as_config(
        tmp_path / "given.json",
        {"output": tmp_path / "made", "model": "me/policy", "dtype": "float32", **PIXELS},
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    line = [sys.executable, "-m", "training.adopt", str(given)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in model.glob("*.safetensors"):
        made = tmp_path / "made" / path.name
        assert not made.is_symlink()
        assert same_file(made, (snapshot / path.name).resolve())
