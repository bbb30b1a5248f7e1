"""Images that occur several times in a batch, processed once and encoded once.

Works for any model whose inner module has `get_image_features`, as those of transformers do: what
it returns for one copy of an image is handed out for the others, and gradients come back to the
one copy. Where such an output has a form not known here, all copies are encoded as ever.
"""

import copy
import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from training.prefix_batches import members

PIXELS = ("pixel_values", "image_grid_thw")  # of models whose images are rows of patches
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
    """Stands in for a module's `get_image_features`: copies that follow each other count as one.

    `patches` is the number of rows of pixel values encoded so far: patches for models with an
    `image_grid_thw`, else images.
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
        images = _images(given) if self.active else None
        inverse = _repeats(images) if images is not None else []
        if images is None or len(set(inverse)) == len(images):
            self.patches += len(given["pixel_values"])
            return self.encode(**given)
        first = list(dict.fromkeys(inverse))
        kept = [inverse.index(number) for number in first]
        unique = {"pixel_values": torch.cat([images[i] for i in kept])}
        if (grid := given.get("image_grid_thw")) is not None:
            unique["image_grid_thw"] = grid[kept]
        features = _expanded(self.encode(**{**given, **unique}), inverse, len(kept))
        if features is None:
            self.patches += len(unique["pixel_values"]) + len(given["pixel_values"])
            return self.encode(**given)
        self.patches += len(unique["pixel_values"])
        return features

    def _variadic(self) -> list[str]:
        kinds = self.signature.parameters.values()
        return [p.name for p in kinds if p.kind is inspect.Parameter.VAR_KEYWORD]


class PromptsOnce:
    """Stands in for the processor while TRL scores a batch: each group is processed once.

    TRL asks twice, for each of a group's copies, first for the prompts' tokens, then for the
    model's inputs. The second answer is put together from the first. With `per_group`, patches and
    grids are given once a group instead of once a row.
    """

    def __init__(self, processor: Any, groups: Sequence[int], per_group: bool):
        self._processor = processor
        self._rows = members(groups)
        order = {group: index for index, group in enumerate(self._rows)}
        self._group_of = [order[group] for group in groups]
        self._per_group = per_group
        self._fields: list[dict[str, Any]] = []
        self.calls = 0  # of the image processor
        self.unique_images = 0  # that nobody asked for before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def tokenize(
        self, prompts: Sequence[Any], tokenize: Callable[[list[Any]], tuple[list, Any, dict]]
    ) -> tuple[list[list[int]], list[Any] | None, dict[str, Any]]:
        """`tokenize` (TRL's `_tokenize_prompts`) on one prompt a group; its answer for all rows."""
        with remembered(self._processor) as memory:
            before = memory.calls, len(memory.seen)
            told = [tokenize([prompts[rows[0]]]) for rows in self._rows.values()]
            self.calls = memory.calls - before[0]
            self.unique_images = len(memory.seen) - before[1]
        self._fields = [fields for _, _, fields in told]
        ids = [told[group][0][0] for group in self._group_of]
        has_images = any(images for _, images, _ in told)
        images = [told[g][1][0] if told[g][1] else None for g in self._group_of]
        return ids, images if has_images else None, self._merged(self._group_of)

    def __call__(self, **_: Any) -> dict[str, Any]:
        """The model's inputs as tensors; per-token fields are padded on the left."""
        merged = self._merged(self._group_of)
        if self._per_group:
            once = self._merged(range(len(self._fields)))
            merged |= {key: once[key] for key in PIXELS if key in once}
        return {key: _tensor(value) for key, value in merged.items()}

    def _merged(self, groups: Sequence[int]) -> dict[str, Any]:
        keys = dict.fromkeys(key for fields in self._fields for key in fields)
        merged = {}
        for key in keys:
            values = [self._fields[group][key] for group in groups if key in self._fields[group]]
            tensors = isinstance(values[0], torch.Tensor)
            merged[key] = torch.cat(values) if tensors else [x for value in values for x in value]
        return merged


@contextmanager
def remembered(processor: Any) -> Iterator["Remembering"]:
    """Each picture goes through the image processor once within this; nested, within the outermost."""
    own = processor.image_processor
    if isinstance(own, Remembering):
        yield own
        return
    processor.image_processor = memory = Remembering(own)
    try:
        yield memory
    finally:
        processor.image_processor = own


class Remembering:
    """Stands in for an image processor that is asked for the same picture again."""

    def __init__(self, processor: Any):
        self._processor = processor
        self._known: dict[tuple[str, ...], Any] = {}
        self.seen: set[str] = set()
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        digests = tuple(map(_digest, _flat(images)))
        self.seen |= set(digests)
        if digests not in self._known:
            self.calls += 1
            self._known[digests] = self._processor(images, *args, **kwargs)
        known = self._known[digests]
        return type(known)(dict(known))  # whoever asked may take things out


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    return [images]


def _digest(image: Any) -> str:
    shape = (getattr(image, "mode", ""), getattr(image, "size", getattr(image, "shape", "")))
    content = image.numpy() if isinstance(image, torch.Tensor) else image
    return hashlib.sha256(repr(shape).encode() + content.tobytes()).hexdigest()


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value[0], list):
        width = max(len(row) for row in value)
        return torch.tensor([[0] * (width - len(row)) + list(row) for row in value])
    return torch.stack([torch.as_tensor(row) for row in value])


def _images(given: dict[str, Any]) -> list[torch.Tensor] | None:
    """The pixel values of each image, or none where a form not known here came with them."""
    pixels, grid = given["pixel_values"], given.get("image_grid_thw")
    others = [v for k, v in given.items() if k not in PIXELS and isinstance(v, torch.Tensor)]
    if others or not isinstance(pixels, torch.Tensor):
        return None
    if grid is not None:
        return list(pixels.split(grid.prod(-1).tolist()))
    return list(pixels.split(1)) if pixels.ndim == 4 else None


def _repeats(images: list[torch.Tensor]) -> list[int]:
    """For each image the number of its run: 0, 0, 1 for two equal images and another."""
    runs = [0]
    for before, image in itertools.pairwise(images):
        same = before.shape == image.shape and torch.equal(before, image)
        runs.append(runs[-1] + (not same))
    return runs


def _expanded(output: Any, inverse: list[int], count: int) -> Any:
    """`output` for `count` images, given out to as many as `inverse` names; None if unknown."""
    pooled = getattr(output, "pooler_output", None)
    if pooled is None or len(pooled) != count:
        return None
    expanded = copy.copy(output)
    if isinstance(pooled, torch.Tensor):
        expanded.pooler_output = pooled[torch.tensor(inverse, device=pooled.device)]
    else:
        expanded.pooler_output = tuple(pooled[i] for i in inverse)
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        if isinstance(pooled, torch.Tensor):
            return None
        sizes = [len(image) for image in pooled]
        parts = [layer.split(sizes) for layer in deep]
        expanded.deepstack_features = [torch.cat([part[i] for i in inverse]) for part in parts]
    return expanded
