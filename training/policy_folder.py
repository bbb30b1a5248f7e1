"""The policy folder: what transformers, vLLM and PEFT load, and the card that says what it is.

Full weights are always there, in safetensors. A run that trained adapters also leaves them in
`adapter/`, and merges them into base weights read anew, not into those that training held.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from data_cards import Card
from tasks.run import first_line
from training.parts import outside_deepspeed

ADAPTER = "adapter"
UPLOADED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "README.md")
# Beside the policy, and not for the hub: texts of training, settings with paths, states.
KEPT_HERE = (
    "manifest.json",
    "recipe.json",
    "place.json",
    "stats.json",
    "error.txt",
    ".*",
    "*.parquet",
    "state/*",
    "checkpoints/*",
    "last/*",
    "best/*",
)


def save(output: Path, trainer: Any, processor: Any, base: Path, dtype: str) -> None:
    """Write the trainer's weights as a policy; every process must call it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        model.save_pretrained(output / ADAPTER, state_dict=state)
        name_base(output / ADAPTER, base)
        merged(base, output / ADAPTER, dtype).save_pretrained(output)
    else:
        wanted = getattr(torch, dtype)
        state = {k: v.to(wanted) if v.is_floating_point() else v for k, v in state.items()}
        model.save_pretrained(output, state_dict=state)
        _say_dtype(output, dtype)
    processor.save_pretrained(output)


def from_checkpoint(output: Path, checkpoint: Path, processor: Any, base: Path, dtype: str) -> None:
    """Write the weights of a checkpoint as a policy."""
    if (checkpoint / "adapter_config.json").exists():
        model = merged(base, checkpoint, dtype)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (output / ADAPTER).mkdir(parents=True, exist_ok=True)
            (output / ADAPTER / name).write_bytes((checkpoint / name).read_bytes())
        name_base(output / ADAPTER, base)
    else:
        model = _whole(checkpoint, dtype)
    model.save_pretrained(output)
    processor.save_pretrained(output)


def name_base(adapter: Path, base: Path) -> None:
    """Let an adapter name the model it belongs to, and not where that lay on this machine."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    config["base_model_name_or_path"] = _base_name(base)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def merged(base: Path, adapter: Path, dtype: str) -> torch.nn.Module:
    """The base model with an adapter merged in, from files alone."""
    from peft import PeftModel

    with outside_deepspeed():
        return PeftModel.from_pretrained(_whole(base, dtype), adapter).merge_and_unload()


def _whole(folder: Path, dtype: str) -> Any:
    """A model's weights in one process."""
    with outside_deepspeed():
        return AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=True, dtype=getattr(torch, dtype)
        )


def write_card(
    output: Path,
    *,
    cards: list[Card],
    base: Path,
    method: str,
    log: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """Write README.md, a Hugging Face model card: base model, data, method, settings, results."""
    from huggingface_hub import ModelCard, ModelCardData

    licenses = sorted({card.license for card in cards})
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=_base_name(base),
        datasets=None,
        license=licenses[0] if len(licenses) == 1 and licenses[0] != "unknown" else "other",
        license_name="see-data-and-base-model",
        tags=["dive-k", "fine-grained", "grpo", "trl"],
    )
    sets = "\n".join(
        f"- `{card.name}`: {len(card.classes)} classes of {card.noun}, licence of the images: "
        f"{card.license_name or card.license}"
        for card in cards
    )
    listed = "\n".join(f"| {key} | `{json.dumps(value)}` |" for key, value in settings.items())
    text = f"""---
{about.to_yaml()}
---

# {method} policy for {", ".join(card.name for card in cards)}

A vision-language model taught to tell lookalikes apart by method `{method}` of DiVE-k
([arXiv 2511.18305](https://arxiv.org/abs/2511.18305)). It answers open questions and multiple-choice
questions about an image with `<think>reasoning</think><answer>name</answer>`.

## Data

{sets}

Trained on images of base classes only. No image is part of this folder. The weights are also under
the licence of the base model, `{_base_name(base)}`.

## Training

{_results(log)}

| setting | value |
|---|---|
{listed}

Accuracy on test images is found by the stage Evaluate, not here.
"""
    ModelCard(text, ignore_metadata_errors=True).save(output / "README.md")


def push(output: Path, repository: str) -> None:
    """Upload the policy to a private repository of the hub: weights, processor and card, no data.

    A failure is told and not fatal: the policy lies here, and can be pushed again.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if not api.repo_info(repository).private:
            raise PermissionError("it is there and public; make it private, or name another")
        api.upload_folder(
            repo_id=repository,
            folder_path=output,
            allow_patterns=list(UPLOADED),
            ignore_patterns=list(KEPT_HERE),
            commit_message="Policy",
        )
        print(f"train: uploaded to the private repository {repository}", flush=True)
    except Exception as error:
        print(f"train: {repository} was not uploaded: {first_line(error)}", flush=True)


def _say_dtype(output: Path, dtype: str) -> None:
    """The config tells the precision of the weights beside it, not of those in training."""
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _base_name(base: Path) -> str:
    """The hub id or kind of model that a base policy was made from, as its manifest says."""
    try:
        manifest = json.loads((base / "manifest.json").read_text(encoding="utf-8"))
        return manifest["settings"]["model"]
    except (OSError, ValueError, KeyError):
        return base.name


def _results(log: list[dict[str, Any]]) -> str:
    if not log:
        return "No step was logged."
    first, last = log[0], log[-1]
    if last.get("reward") is None:
        return f"{len(log)} steps; loss {first['loss']:.3f} at first, {last['loss']:.3f} at last."
    val = [row for row in log if row.get("val_accuracy") is not None]
    seen = f" Open answers on val images: {val[-1]['val_accuracy']:.1%} right." if val else ""
    return (
        f"{len(log)} optimiser steps (up to step {last['step']}); mean reward {first['reward']:.2f} at "
        f"first, {last['reward']:.2f} at last.{seen}"
    )
