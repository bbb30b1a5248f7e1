"""Policies that are adapters on a base: what they rest on, and their weights made whole.

A policy trained with LoRA holds its adapter and not one more copy of the model. `adapted.json` beside
it names the base and the adapters on it. Whoever generates from such a policy has them merged first,
into a folder for as long as the work takes. This is the one rule for all engines: an engine that
applies adapters itself rounds otherwise, and vLLM applies none to a vision tower.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from tasks.tables import shards

FILE = "adapted.json"
MERGED = "policy"  # the folder of whole weights, in one that is given
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Adapted:
    """The model below, the adapters on it in the order of their training, and the weights' dtype."""

    base: Path
    adapters: tuple[Path, ...]
    dtype: str


def adapted(policy: Path) -> Adapted | None:
    """What a policy rests on; None for one with weights of its own.

    Paths in the file are relative to its folder, so that artifacts can be moved together. Raises
    StageError when the base is not there.
    """
    folder = Path(policy).resolve()
    if not (folder / FILE).is_file():
        return None
    told = json.loads((folder / FILE).read_text(encoding="utf-8"))
    base = Path(os.path.normpath(folder / told["base"]))
    if not (base / "config.json").is_file():
        raise StageError(
            f"{policy} is an adapter, and the model it belongs on is not at {base}; make it again "
            "(luigi --module pipeline.tasks BasePolicy), or put it there"
        )
    return Adapted(base, tuple(folder / name for name in told["adapters"]), told["dtype"])


def write(policy: Path, found: Adapted) -> None:
    """Note down beside a policy's adapters what they rest on; all adapters lie in its folder."""
    folder = policy.resolve()
    told = {
        "base": os.path.relpath(found.base.resolve(), folder),
        "adapters": [path.resolve().relative_to(folder).as_posix() for path in found.adapters],
        "dtype": found.dtype,
    }
    (policy / FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def whole(policy: Path, scratch: Path) -> Path:
    """A folder with all weights of a policy: its own, or one made below `scratch`.

    One that is there already, of a run that was cut off, is taken as it is.
    """
    found = adapted(policy)
    if found is None:
        return policy
    folder = scratch / MERGED
    if not folder.is_dir():
        unfinished = scratch / f"{MERGED}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        print(f"the adapter of {policy} is merged into {found.base}", flush=True)
        merge(policy, unfinished)
        shards.sync_tree(unfinished)
        os.rename(unfinished, folder)
    return folder


def merge(policy: Path, output: Path) -> None:
    """Write an adapted policy with whole weights, as transformers and vLLM load it.

    Each adapter is added in the policy's dtype and rounded, in the order they were trained in. That is
    how the later ones saw the earlier.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    found = adapted(policy)
    if found is None:
        raise StageError(f"{policy} holds no adapter ({FILE}); its weights are whole already")
    model = AutoModelForImageTextToText.from_pretrained(
        found.base, use_safetensors=True, dtype=getattr(torch, found.dtype)
    )
    for adapter in found.adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.generation_config = GenerationConfig()  # written below as it is, valid or not
    model.save_pretrained(output)
    AutoProcessor.from_pretrained(policy).save_pretrained(output)
    if (policy / GENERATION).is_file():
        shutil.copyfile(policy / GENERATION, output / GENERATION)
