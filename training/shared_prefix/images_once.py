"""Images that occur several times in a batch, encoded once.

Works for any model whose inner module has `get_image_features`, as those of transformers do: what
it returns for one copy of an image is handed out for the others, and gradients come back to the
one copy. Where such an output has a form not known here, all copies are encoded as ever.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

PIXELS = ("pixel_values", "image_grid_thw")  # of models whose images are rows of patches
SOME = 64  # values of an image that are looked at before it is compared with another
Batch = dict[str, Any]


def select(images: Batch, num_images: Sequence[int], chosen: Sequence[int]) -> Batch:
    """The images of some entries, in that order; entry i has the next `num_images[i]` of them.

    An entry is a row or a group, as `images` has them; tensors with one element an entry, such as
    token types, are taken along.
    """
    if "pixel_values" not in images:
        return {key: take(value, chosen, len(num_images)) for key, value in images.items()}
    parts = split_pixel_values_by_grid({**images, "num_images": list(num_images)})
    taken = {key: take(value, chosen, len(num_images)) for key, value in parts.items()}
    whole = unsplit_pixel_values_by_grid(taken)
    return {key: whole[key] for key in images}


def take(value: Any, rows: Sequence[int], count: int) -> Any:
    """Some of `count` elements of a tensor or list; anything of another size stays whole."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value[torch.tensor(rows, dtype=torch.long, device=value.device)]
    if isinstance(value, list) and len(value) == count:
        return [value[row] for row in rows]
    return value


class ImagesOnce:
    """Stands in for a module's `get_image_features`: copies of an image, or of a tile, count as one.

    `patches` is the number of rows of pixel values encoded so far: patches for models with an
    `image_grid_thw`, else images, with their tiles or each tile by itself as the model has them.
    """

    def __init__(self, module: torch.nn.Module):
        self.encode: Callable[..., Any] = module.get_image_features
        self.signature = inspect.signature(self.encode)
        self.patches = 0
        self.active = True
        module.get_image_features = self

    @contextmanager
    def off(self) -> Iterator[None]:
        """Encode every copy meanwhile."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        extra = given.pop(next(iter(self._variadic()), ""), {})
        given = {**given, **extra}
        entries = _entries(given) if self.active else {}
        inverse = _repeats(list(zip(*entries.values(), strict=True)))
        if len(set(inverse)) == len(inverse):
            self.patches += len(given["pixel_values"])
            return self.encode(**given)
        kept = [inverse.index(number) for number in range(max(inverse) + 1)]
        unique = {name: torch.cat([parts[i] for i in kept]) for name, parts in entries.items()}
        features = _expanded(self.encode(**{**given, **unique}), inverse, unique["pixel_values"])
        if features is None:
            self.patches += len(unique["pixel_values"]) + len(given["pixel_values"])
            return self.encode(**given)
        self.patches += len(unique["pixel_values"])
        return features

    def _variadic(self) -> list[str]:
        kinds = self.signature.parameters.values()
        return [p.name for p in kinds if p.kind is inspect.Parameter.VAR_KEYWORD]


def _entries(given: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """What belongs to each image, by the name of the input; empty for a form not known here.

    Known are rows of patches with a grid, images, and images with their tiles, filled up to as many.
    Other tensors that have a row for each image, such as masks and sizes, belong to it.
    """
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
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
    """For each entry the number of its kind, by first appearance: 0, 1, 0 where the third is the first."""
    alike: dict[Any, list[int]] = {}  # kinds that have some values in common
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
    """`output` for the images of `pixels`, given out to those that `inverse` names; None if unknown."""
    count = max(inverse) + 1
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        return None
    expanded = copy.copy(output)
    if len(pooled) == count:
        tensor = isinstance(pooled, torch.Tensor)
        chosen = [pooled[i] for i in inverse]
        expanded.pooler_output = torch.stack(chosen) if tensor else tuple(chosen)
    elif pixels.ndim == 5 and isinstance(pooled, torch.Tensor):  # of each tile that is not empty
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
