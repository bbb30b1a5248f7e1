"""Wrappers around a processor, by which each prompt and image is processed once a batch.

TRL calls the processor on every copy of a group's prompt, and twice: for the prompts' tokens, and for
the model's inputs.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from training.shared_prefix.images_once import PIXELS
from training.shared_prefix.packing import members


class PromptsOnce:
    """Replaces the processor while TRL scores a batch, and processes each group once.

    TRL first calls `tokenize` for the prompts' tokens. It then calls the processor for the model's
    inputs, which are assembled from the first answer. With `per_group` the inputs have patches and
    grids once a group, else once a row.
    """

    def __init__(self, processor: Any, groups: Sequence[int], per_group: bool):
        self._processor = processor
        self.rows = members(groups)
        order = {group: index for index, group in enumerate(self.rows)}
        self.group_of = [order[group] for group in groups]
        self._per_group = per_group
        self._fields: list[dict[str, Any]] = []
        self.calls = 0  # of the image processor
        self.unique_images = 0  # that were not processed before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    @property
    def image_processor(self) -> Any:
        """The processor's own image processor, which already knows each image's number of tiles."""
        tiles = [len(self._fields[group].get("pixel_values", ())) for group in self.group_of]
        return TilesKnown(self._processor.image_processor, tiles)

    def tokenize(
        self, prompts: Sequence[Any], tokenize: Callable[[list[Any]], tuple[list, Any, dict]]
    ) -> tuple[list[list[int]], list[Any] | None]:
        """Call `tokenize` (TRL's `_tokenize_prompts`) on one prompt a group; tokens and images of all rows."""
        with remembered(self._processor) as memory:
            before = memory.calls, len(memory.seen)
            answers = [tokenize([prompts[rows[0]]]) for rows in self.rows.values()]
            self.calls = memory.calls - before[0]
            self.unique_images = len(memory.seen) - before[1]
        self._fields = [fields for _, _, fields in answers]
        ids = [answers[group][0][0] for group in self.group_of]
        has_images = any(images for _, images, _ in answers)
        images = [answers[g][1][0] if answers[g][1] else None for g in self.group_of]
        return ids, images if has_images else None

    def by_row(self) -> dict[str, Any]:
        """The processor's further fields, such as pixel values, of all rows."""
        return self._merged(self.group_of)

    def by_group(self) -> dict[str, Any]:
        """The same, once a group."""
        return self._merged(range(len(self._fields)))

    def __call__(self, **_: Any) -> dict[str, Any]:
        """The model's inputs as tensors; per-token fields are padded on the left."""
        merged = self.by_row()
        if self._per_group:
            once = self.by_group()
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
    """Within this, the image processor processes each picture once; a nested use shares the memory."""
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
    """Wraps an image processor and returns the stored result for a picture it has processed."""

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
        return type(known)(dict(known))  # a copy, since the caller may remove entries


class TilesKnown:
    """Wraps an image processor and answers TRL's question for the number of tiles (InternVL)."""

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
    """Pad tensors with zeros at the end, so that they differ in their first dimension alone.

    A processor pads the images of one call alike, when some have more tiles than others.
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
