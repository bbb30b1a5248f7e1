"""LoRA policies: finds the base model below their adapters, and merges the weights.

A policy trained with LoRA holds its adapter and no copy of the model. `adapted.json` beside the adapter
names the base model and the adapters on it. Before any engine generates from such a policy, the
adapters are merged into a temporary folder. All engines do so, since an engine that applies adapters
itself rounds differently, and vLLM applies none to a vision tower.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from tasks.tables import shards

FILE = "adapted.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank
# Words in the names of modules outside the language model, over the families of transformers.
OUTSIDE = re.compile(r"visual|vision|image|projector|connector|merger|resampler")
MERGED = "policy"  # the folder of merged weights, below a scratch folder
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class AdapterStack:
    """The base model, the adapters on it in the order of their training, and the weights' dtype."""

    base: Path
    adapters: tuple[Path, ...]
    dtype: str


def adapter_stack(policy: Path) -> AdapterStack | None:
    """The base model and adapters of a policy; None for a policy with full weights.

    Paths in the file are relative to its folder, so that artifacts can be moved together. Raises
    StageError when the base is missing.
    """
    folder = Path(policy).resolve()
    if not (folder / FILE).is_file():
        return None
    values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    base = Path(os.path.normpath(folder / values["base"]))
    if not (base / "config.json").is_file():
        raise StageError(
            f"{policy} is an adapter, and the model it belongs on is not at {base}; make it again "
            "(luigi --module pipeline.tasks BasePolicy), or put it there"
        )
    adapters = tuple(folder / name for name in values["adapters"])
    return AdapterStack(base, adapters, values["dtype"])


def write(policy: Path, stack: AdapterStack) -> None:
    """Write `adapted.json` into a policy's folder, which holds all adapters of the stack."""
    folder = policy.resolve()
    values = {
        "base": os.path.relpath(stack.base.resolve(), folder),
        "adapters": [path.resolve().relative_to(folder).as_posix() for path in stack.adapters],
        "dtype": stack.dtype,
    }
    (policy / FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def merged_weights(policy: Path, scratch: Path) -> Path:
    """The folder with a policy's full weights: the policy itself, or merged weights below `scratch`.

    Merged weights that an interrupted run left there are used again.
    """
    stack = adapter_stack(policy)
    if stack is None:
        return policy
    folder = scratch / MERGED
    if not folder.is_dir():
        unfinished = scratch / f"{MERGED}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        print(f"the adapter of {policy} is merged into {stack.base}", flush=True)
        merge(policy, unfinished)
        shards.sync_tree(unfinished)
        os.rename(unfinished, folder)
    return folder


def merge(policy: Path, output: Path) -> None:
    """Write a LoRA policy with merged weights, as transformers and vLLM load it.

    The adapters are added one by one in the order of their training, and rounded to the policy's dtype
    each time: a later adapter was trained on exactly these weights.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    stack = adapter_stack(policy)
    if stack is None:
        raise StageError(f"{policy} holds no adapter ({FILE}); its weights are whole already")
    model = AutoModelForImageTextToText.from_pretrained(
        stack.base, use_safetensors=True, dtype=getattr(torch, stack.dtype)
    )
    for adapter in stack.adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.generation_config = GenerationConfig()  # the policy's file is copied below, valid or not
    model.save_pretrained(output)
    AutoProcessor.from_pretrained(policy).save_pretrained(output)
    if (policy / GENERATION).is_file():
        shutil.copyfile(policy / GENERATION, output / GENERATION)


def rank_for_vllm(adapter: Path) -> int:
    """The smallest of RANKS that holds the adapter's rank.

    Raises StageError when the folder holds no adapter, its rank is above all of them, or it adapts
    more than the language model: vLLM leaves that part out in silence.
    """
    from safetensors import SafetensorError, safe_open

    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
        with safe_open(adapter / "adapter_model.safetensors", "np") as weights:
            outside = sorted(filter(OUTSIDE.search, weights.keys()))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(f"[engine] lora = {adapter} holds no LoRA adapter ({error})") from error
    if outside:
        raise StageError(
            f"[engine] lora = {adapter} adapts more than the language model ({outside[0]}), which vLLM "
            "would leave out; merge it into the weights (PEFT's merge_and_unload) and ask those"
        )
    if rank > RANKS[-1]:
        raise StageError(f"[engine] lora = {adapter}: its rank is above {RANKS[-1]}")
    return next(allowed for allowed in RANKS if allowed >= rank)
