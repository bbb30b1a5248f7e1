"""The files of a model's weights, in a folder or of the hub, and the precision that they are in."""

from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

# As the header of a safetensors file names them.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def weight_files(model: str) -> list[Path]:
    """The safetensors of a model and, where there are several, their index; empty where it has none.

    Of the hub they are downloaded, or found where they were downloaded to.
    """
    if index := file_of(model, SAFE_WEIGHTS_INDEX_NAME):
        shards, _ = get_checkpoint_shard_files(model, index)
        return [*map(Path, shards), Path(index)]
    single = file_of(model, SAFE_WEIGHTS_NAME)
    return [Path(single)] if single else []


def file_of(model: str, name: str) -> str | None:
    """A file of a folder or a model of the hub, downloaded where it must be; None where there is none."""
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)


def is_of(path: Path, dtype: str) -> bool:
    """Whether every number with a fraction in a file is of a precision; indices count as of any."""
    if path.suffix != ".safetensors":
        return True
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {kind for kind in kinds if "F" in kind} <= {dtype}
