"""Makes a published model, or a folder, the base policy without training; weights are linked.

    python -m training.adopt recipe.json

If the weights are safetensors in the wanted precision, no model is loaded. Their files become hard
links on the same file system (the hub's cache is often on it), and copies elsewhere. The config, the
processor and the generation config are written anew, because the processor holds the image size.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
)
from transformers.utils.logging import disable_progress_bar

from tasks.engines.adapters import FILE, GENERATION
from tasks.runtime import waiting
from tasks.runtime.command import main
from tasks.runtime.errors import StageError, first_line
from tasks.runtime.links import link
from training.model import tiny_policy, weights
from training.model.processors import sized_processor
from training.settings import ModelSettings


def adopt(output: Path, *, settings: ModelSettings) -> None:
    """Write the base policy into the folder `output`.

    Raises StageError when the model cannot be loaded.
    """
    disable_progress_bar()  # the library's own
    model, dtype = settings.model, settings.dtype
    if (Path(model).expanduser() / FILE).is_file():
        raise StageError(
            f"[BasePolicy] model = {model} is an adapter; make whole weights of it first: "
            f"python -m training.export {model} FOLDER"
        )
    model = tiny_policy.source(model)
    model = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    try:
        config = AutoConfig.from_pretrained(model)
        processor = sized_processor(model, settings.min_pixels, settings.max_pixels)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ValueError(f"{config.model_type} is no model that takes images and answers text")
        files = weights.weight_files(model)
        if files and all(weights.is_of(path, weights.DTYPES[dtype]) for path in files):
            linked = sum(link(path, output / path.name) for path in files)
            config.dtype = dtype
            config.save_pretrained(output)
            print(
                f"base_policy: {len(files)} files of weights taken over as they are, {linked} of them "
                "as hard links",
                flush=True,
            )
        else:
            with waiting.loading(f"base_policy: loading {waiting.weights(model)}"):
                policy = AutoModelForImageTextToText.from_pretrained(
                    model, use_safetensors=True, dtype=getattr(torch, dtype)
                )
            policy.generation_config = (
                GenerationConfig()
            )  # the model's own is copied below, valid or not
            policy.save_pretrained(output)
        _write_generation(output, model, config)
        if card := weights.file_of(model, "README.md"):
            (output / "README.md").write_bytes(Path(card).read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise StageError(
            f"[BasePolicy] model = {model} cannot be loaded: {first_line(error)}"
        ) from error
    processor.save_pretrained(output)


def _write_generation(output: Path, model: str, config: Any) -> None:
    """Copy the model's generation config unchanged; without one, make it from the model's config."""
    if own := weights.file_of(model, GENERATION):
        (output / GENERATION).write_bytes(Path(own).read_bytes())
    else:
        GenerationConfig.from_model_config(config).save_pretrained(output)


if __name__ == "__main__":
    main(adopt)
