"""Encodes each distinct image of a batch once, and copies its features to the repeats.

It works for any model of transformers whose inner module has `get_image_features`. Gradients of all
copies flow back into the one encoded image. If the output has an unknown form, every copy is encoded.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

PIXELS = ("pixel_values", "image_grid_thw")  # inputs of models whose images are rows of patches
SOME = 64  # values of an image that are compared first, before all of them are
Batch = dict[str, Any]


def select(images: Batch, num_images: Sequence[int], entries: Sequence[int]) -> Batch:
    """The images of the entries with these numbers, in that order.

    An entry is a row or a group of the batch; entry i has the next `num_images[i]` images. Tensors
    with one element an entry, such as token types, are selected, too.
    """
    if "pixel_values" not in images:
        return {key: take(value, entries, len(num_images)) for key, value in images.items()}
    parts = split_pixel_values_by_grid({**images, "num_images": list(num_images)})
    taken = {key: take(value, entries, len(num_images)) for key, value in parts.items()}
    whole = unsplit_pixel_values_by_grid(taken)
    return {key: whole[key] for key in images}


def take(value: Any, rows: Sequence[int], count: int) -> Any:
    """The elements `rows` of a tensor or list of `count` elements; any other value stays whole."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value[torch.tensor(rows, dtype=torch.long, device=value.device)]
    if isinstance(value, list) and len(value) == count:
        return [value[row] for row in rows]
    return value


class ImagesOnce:
    """Replaces a module's `get_image_features`, and encodes each distinct image or tile once.

    `patches` counts the rows of pixel values encoded so far. A row is a patch for models with an
    `image_grid_thw`; else it is an image with its tiles, or a single tile, as the model has them.
    """

    def __init__(self, module: torch.nn.Module):
        self.encode: Callable[..., Any] = module.get_image_features
        self.signature = inspect.signature(self.encode)
        self.patches = 0
        self.active = True
        module.get_image_features = self

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this, encode every copy."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self.signature.bind(*args, **kwargs).arguments
        extra = named.pop(next(iter(self._variadic()), ""), {})
        named = {**named, **extra}
        entries = _entries(named) if self.active else {}
        inverse = _repeats(list(zip(*entries.values(), strict=True)))
        if len(set(inverse)) == len(inverse):
            self.patches += len(named["pixel_values"])
            return self.encode(**named)
        kept = [inverse.index(number) for number in range(max(inverse) + 1)]
        unique = {name: torch.cat([parts[i] for i in kept]) for name, parts in entries.items()}
        features = _expanded(self.encode(**{**named, **unique}), inverse, unique["pixel_values"])
        if features is None:
            self.patches += len(unique["pixel_values"]) + len(named["pixel_values"])
            return self.encode(**named)
        self.patches += len(unique["pixel_values"])
        return features

    def _variadic(self) -> list[str]:
        """The name of the `**kwargs` parameter, if there is one."""
        kinds = self.signature.parameters.values()
        return [p.name for p in kinds if p.kind is inspect.Parameter.VAR_KEYWORD]


def _entries(arguments: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """Each input's name -> its part for each image; empty for an unknown form.

    Known forms are rows of patches with a grid, images (4-D), and images padded to equally many tiles
    (5-D). Other tensors, such as masks and sizes, must have one row an image.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    pixels, grid = tensors.get("pixel_values"), tensors.get("image_grid_thw")
    if pixels is None or (grid is None and pixels.ndim not in (4, 5)):
        return {}
    count = len(pixels) if grid is None else len(grid)
    if any(
        not value.ndim or len(value) != count for value in tensors.values() if value is not pixels
    ):
        return {}
    parts = {name: list(value.split(1)) for name, value in tensors.items() if value is not pixels}
    sizes = 1 if grid is None else grid.prod(-1).tolist()
    return {"pixel_values": list(pixels.split(sizes)), **parts}


def _repeats(entries: list[tuple[torch.Tensor, ...]]) -> list[int]:
    """Number equal entries alike, by first appearance: [0, 1, 0] where the third equals the first."""
    alike: dict[Any, list[int]] = {}  # shape and some values -> the kinds that have them
    first: list[tuple[torch.Tensor, ...]] = []
    kinds = []
    for entry in entries:
        values = entry[0].flatten()
        some = entry[0].shape, tuple(values[:: max(1, len(values) // SOME)].tolist())
        candidates = alike.setdefault(some, [])
        for kind in candidates:
            if all(map(torch.equal, first[kind], entry)):
                break
        else:
            kind = len(first)
            first.append(entry)
            candidates.append(kind)
        kinds.append(kind)
    return kinds


def _expanded(output: Any, inverse: list[int], pixels: torch.Tensor) -> Any:
    """Repeat the features of distinct images for all copies; None for an unknown form of `output`.

    `pixels` are the distinct images, and `inverse[i]` is the one that copy i equals.
    """
    count = max(inverse) + 1
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        return None
    expanded = copy.copy(output)
    if len(pooled) == count:
        tensor = isinstance(pooled, torch.Tensor)
        copies = [pooled[i] for i in inverse]
        expanded.pooler_output = torch.stack(copies) if tensor else tuple(copies)
    elif pixels.ndim == 5 and isinstance(
        pooled, torch.Tensor
    ):  # one element for each tile that is not padding
        tiles = pixels.flatten(2).any(-1).sum(1).tolist()
        if sum(tiles) != len(pooled):
            return None
        parts = pooled.split(tiles)
        expanded.pooler_output = torch.cat([parts[i] for i in inverse])
    else:
        return None
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        if isinstance(pooled, torch.Tensor):
            return None
        sizes = [len(image) for image in pooled]
        parts = [layer.split(sizes) for layer in deep]
        expanded.deepstack_features = [torch.cat([part[i] for i in inverse]) for part in parts]
    return expanded
