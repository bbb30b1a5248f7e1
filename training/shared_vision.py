"""Images that occur several times in a batch, processed once and encoded once.

Works for any model whose inner module has `get_image_features`, as those of transformers do: what
it returns for one copy of an image is handed out for the others, and gradients come back to the
one copy. Where such an output has a form not known here, all copies are encoded as ever.
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from training.prefix_batches import members

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

    @property
    def image_processor(self) -> Any:
        """The processor's own; how many tiles each image has it need not find out anew."""
        tiles = [len(self._fields[group].get("pixel_values", ())) for group in self._group_of]
        return TilesKnown(self._processor.image_processor, tiles)

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
            if isinstance(values[0], torch.Tensor):
                merged[key] = torch.cat(_filled(values))
                continue
            merged[key] = [entry for value in values for entry in value]
            if isinstance(merged[key][0], torch.Tensor):
                merged[key] = torch.cat(_filled([entry[None] for entry in merged[key]]))
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


class TilesKnown:
    """Stands in for an image processor that TRL asks for the number of tiles alone (InternVL)."""

    def __init__(self, processor: Any, tiles: list[int]):
        self._processor, self._tiles = processor, tiles

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if "crop_to_patches" in options:
            return {"num_patches": torch.tensor(self._tiles)}
        return self._processor(*arguments, **options)


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flat(part)]
    return [images]


def _digest(image: Any) -> str:
    shape = (getattr(image, "mode", ""), getattr(image, "size", getattr(image, "shape", "")))
    content = image.numpy() if isinstance(image, torch.Tensor) else image
    return hashlib.sha256(repr(shape).encode() + content.tobytes()).hexdigest()


def _filled(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors with zeros behind, so that they differ in their first size alone.

    A processor does so with the images of one call, where some have more tiles than others.
    """
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    return [
        torch.nn.functional.pad(
            value,
            [
                end
                for have, wanted in zip(value.shape[:0:-1], most[::-1], strict=True)
                for end in (0, wanted - have)
            ],
        )
        for value in values
    ]


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value[0], list):
        width = max(len(row) for row in value)
        return torch.tensor([[0] * (width - len(row)) + list(row) for row in value])
    return torch.stack([torch.as_tensor(row) for row in value])


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
