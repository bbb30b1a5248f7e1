"""Finds a model's weight files, in a folder or on the hub, and checks their precision."""

from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

# torch's names -> the names in the header of a safetensors file.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def weight_files(model: str) -> list[Path]:
    """A model's safetensors files and, of several, their index; empty if it has none.

    Those of a model on the hub are downloaded, unless they are in the cache.
    """
    if index := file_of(model, SAFE_WEIGHTS_INDEX_NAME):
        shards, _ = get_checkpoint_shard_files(model, index)
        return [*map(Path, shards), Path(index)]
    single = file_of(model, SAFE_WEIGHTS_NAME)
    return [Path(single)] if single else []


def file_of(model: str, name: str) -> str | None:
    """The path of a model's file, in its folder or downloaded from the hub; None if it has no such file."""
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)


def is_of(path: Path, dtype: str) -> bool:
    """Whether all floating-point tensors of a file have this precision; True for an index."""
    if path.suffix != ".safetensors":
        return True
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {kind for kind in kinds if "F" in kind} <= {dtype}
