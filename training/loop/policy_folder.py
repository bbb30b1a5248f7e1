"""Writes the policy folder that transformers, vLLM and PEFT load, and its model card.

Weights are safetensors. A policy whose weights were all trained has them all in its folder. A policy
with adapters has only those, in `adapter/`, and names the base below them
(`tasks/engines/adapters.py`); `export.py` merges them. Both have the config, the processor, the chat
template and the base's generation config.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from data_cards import Card
from tasks.engines import adapters
from tasks.language import prompts
from tasks.runtime.errors import StageError, first_line
from tasks.runtime.links import link, link_tree
from tasks.tables import manifest
from training.model import weights
from training.model.sharding import outside_deepspeed
from training.settings import Round, TrainSettings

WEIGHTS = (
    "model*.safetensors*"  # a whole model's weights and their index, in a policy or a checkpoint
)
ADAPTER = "adapter"
EARLIER = "earlier"  # adapters of earlier rounds, where each round trains its own
UPLOADED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "README.md")
LOADING = "## Loading"
WHOLE = """The weights are whole: `AutoModelForImageTextToText.from_pretrained`, with `AutoProcessor`, or vLLM
loads this folder.
"""
# Settings that the card's table omits: the data, which the card describes, folders, and the upload.
OMITTED = ("card", "mcq", "download", "split", "base", "policy", "push_to_hub")
# Files that are not uploaded: completions, settings with paths, training states.
KEPT_HERE = (
    "manifest.json",
    "recipe.json",
    "place.json",
    adapters.FILE,
    "stats.json",
    "error.txt",
    ".*",
    "*.parquet",
    "state/*",
    "checkpoints/*",
    "last/*",
    "best/*",
)


def save(output: Path, trainer: Any, processor: Any, origin: Path, dtype: str) -> None:
    """Write the trainer's weights as a policy in `dtype`; every process must call it.

    `origin` is the policy that the model was loaded from.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.accelerator.is_main_process:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    clear(output)
    if hasattr(model, "peft_config"):
        model.save_pretrained(output / ADAPTER, state_dict=state)
        _rest_on(output, origin, dtype)
    else:
        wanted = getattr(torch, dtype)
        state = {k: v.to(wanted) if v.is_floating_point() else v for k, v in state.items()}
        model.save_pretrained(output, state_dict=state)
        _write_config(output, output, dtype)
    _finish(output, processor, origin)


def from_checkpoint(
    output: Path, checkpoint: Path, processor: Any, origin: Path, dtype: str
) -> None:
    """Write a checkpoint's weights as a policy: as hard links if they are in `dtype`, else converted."""
    clear(output)
    if (checkpoint / "adapter_config.json").exists():
        (output / ADAPTER).mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            link(checkpoint / name, output / ADAPTER / name)
        _rest_on(output, origin, dtype)
    elif all(weights.is_of(path, weights.DTYPES[dtype]) for path in checkpoint.glob(WEIGHTS)):
        output.mkdir(exist_ok=True)
        for path in checkpoint.glob(WEIGHTS):
            link(path, output / path.name)
        _write_config(checkpoint, output, dtype)
    else:
        with outside_deepspeed():
            model = AutoModelForImageTextToText.from_pretrained(
                checkpoint, use_safetensors=True, dtype=getattr(torch, dtype)
            )
        model.save_pretrained(output)
    _finish(output, processor, origin)


def clear(output: Path) -> None:
    """Delete an earlier attempt's weights: they may be hard links, and writing would change both files."""
    for path in output.glob(WEIGHTS):
        path.unlink()
    for name in (ADAPTER, EARLIER):
        shutil.rmtree(output / name, ignore_errors=True)


def name_base(adapter: Path, base: Path) -> None:
    """Write the base model's name into an adapter's config, in place of a path on this machine."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    config["base_model_name_or_path"] = _base_name(base)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _rest_on(output: Path, origin: Path, dtype: str) -> None:
    """Record the base of an adapter, and link the adapters that earlier rounds trained."""
    below = adapters.adapter_stack(origin) or adapters.AdapterStack(origin, (), dtype)
    earlier = []
    for number, adapter in enumerate(below.adapters, start=1):
        earlier.append(output / EARLIER / str(number))
        link_tree(adapter, earlier[-1])
    own = output / ADAPTER
    name_base(own, below.base)
    adapters.write(output, adapters.AdapterStack(below.base, (*earlier, own), dtype))
    _write_config(origin, output, dtype)


def _finish(output: Path, processor: Any, origin: Path) -> None:
    """Write the generation config and the processor.

    The trainer changes the generation config. A policy keeps its base's, so that both stop at the same
    tokens.
    """
    if (own := origin / adapters.GENERATION).is_file():
        (output / adapters.GENERATION).write_bytes(own.read_bytes())
    processor.save_pretrained(output)


def write_card(
    output: Path,
    cards: list[Card],
    round: Round,
    settings: TrainSettings,
    log: list[dict[str, Any]],
) -> None:
    """Write README.md, a Hugging Face model card: base model, data, method, settings, results."""
    from huggingface_hub import ModelCard, ModelCardData

    licenses = sorted({card.license for card in cards})
    about = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=_base_name(round.base),
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
    values = {**round.values(), **settings.values()}
    listed = "\n".join(
        f"| {key} | `{json.dumps(value)}` |" for key, value in values.items() if key not in OMITTED
    )
    seen = "Trained on images of base classes only."
    if round.unlabelled:
        seen = f"Trained without labels on the {round.unlabelled}."
    text = f"""---
{about.to_yaml()}
---

# {round.method} policy for {", ".join(card.name for card in cards)}

A vision-language model taught to tell lookalikes apart by method `{round.method}` of DiVE-k
([arXiv 2511.18305](https://arxiv.org/abs/2511.18305)). It answers open questions and multiple-choice
questions about an image with `{prompts.completion("reasoning", "name", round.prompt_style)}`.

## Data

{sets}

{seen} No image is part of this folder. The weights are also under
the licence of the base model, `{_base_name(round.base)}`.

## Training

{_results(log)}

| setting | value |
|---|---|
{listed}

Accuracy on test images is found by the stage Evaluate, not here.

{_loading(output, round.base, settings)}"""
    ModelCard(text, ignore_metadata_errors=True).save(output / "README.md")


def _loading(output: Path, base: Path, settings: TrainSettings) -> str:
    """The card's section on loading the policy; with adapters, on their base."""
    if not (adapted := adapters.adapter_stack(output)):
        return f"{LOADING}\n\n{WHOLE}"
    added = "".join(
        f'model = PeftModel.from_pretrained(model, HERE, subfolder="{path.relative_to(output.resolve())}")'
        ".merge_and_unload()\n"
        for path in adapted.adapters
    )
    quantised = (
        "In training the weights below the adapter were quantised (nf4). Merged weights are the "
        "unquantised base plus the adapter, a sum that training did not see.\n\n"
    )
    return f"""{LOADING}

This folder holds LoRA weights, not the whole model; `HERE` is its place or hub id.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{_base_name(base)}", dtype="{adapted.dtype}")
{added}processor = AutoProcessor.from_pretrained(HERE)
```

{quantised if settings.quantized else ""}`python -m training.export HERE OUT` writes whole weights, which vLLM loads, too.
"""


def merged_card(text: str) -> str:
    """The card of a merged policy, from the card of the policy with adapters."""
    about, _, loading = text.partition(f"{LOADING}\n")
    nf4 = [part for part in loading.split("\n\n") if part.startswith("In training")]
    return "\n\n".join([f"{about}{LOADING}", *nf4, WHOLE])


def push(output: Path, repository: str) -> None:
    """Upload the policy to a private repository of the hub: weights, processor and card, no data.

    A policy with adapters uploads those and not its base. A failure prints a line and ends nothing:
    the policy is in its folder, and can be uploaded later.
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


def _write_config(source: Path, output: Path, dtype: str) -> None:
    """Copy the config, with the saved weights' precision in place of the trained weights'."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (output / "config.json").write_text(text, encoding="utf-8")


def _base_name(base: Path) -> str:
    """The model that a base policy was made from, as its manifest records it; else the folder's name."""
    if adapted := adapters.adapter_stack(base):
        base = adapted.base
    try:
        return manifest.read(base).settings["model"]
    except (StageError, KeyError):
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
