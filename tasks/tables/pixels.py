"""Decodes stored images at the size that a policy's image processor would scale them to.

A processor scales a large photograph down. Until then 12 megapixels take 36 MB, for every image
that waits for an engine and every question of a batch. So the decoder already scales it, with the
processor's own rule and filter, and the processor then leaves the size alone. Training and inference
both decode here, so that they see the same pixels. Smaller pictures stay as they are.
"""

import inspect
import io
import sys
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

from PIL import Image

from tasks.runtime.errors import first_line

# libjpeg can divide a JPEG's sides by 2, 4 or 8 while it decodes. It may do so down to GAP times the
# final sides. On grainy photographs that changes a value by 0.3 to 0.5 of 255 levels on average, and
# takes a third of the time. Without it, as with a PNG, a few values of 1,000 differ by one level.
GAP = 2
# Sides in pixels, and a ratio of the longer to the shorter, from which a processor is tried with a blank
# picture. Qwen's refuse a ratio above 200; others fail on sides that become smaller than a patch.
NARROW, ELONGATED = 32, 50
QWEN = {"height", "width", "factor", "min_pixels", "max_pixels"}
IDEFICS = {"image", "resolution_max_side"}


class Rule(NamedTuple):
    """A processor's first resize: which pictures are too large, and the size they are scaled to.

    Both functions take (height, width) in pixels, and `resized` returns them. `resample` is the
    number of Pillow's filter.
    """

    too_large: Callable[[int, int], bool]
    resized: Callable[[int, int], tuple[int, int]]
    resample: int


class Decoder:
    """Decodes images for a policy's processor; without a processor, at their full size."""

    def __init__(self, processor: Any = None):
        own = getattr(processor, "image_processor", None)
        self._processor = own
        self._rule = None if own is None else rule_of(own)
        self._refusals: dict[tuple[int, int], str | None] = {}

    def __call__(self, data: bytes) -> Image.Image:
        """The RGB picture that encoded bytes hold, no larger than the policy can use.

        Raises ValueError where the policy's processor refuses pictures of this size.
        """
        with Image.open(io.BytesIO(data)) as image:
            if reason := self.refusal(*image.size):
                raise ValueError(reason)
            size = self.size(*image.size)
            if self._rule is None or size == image.size:
                return image.convert("RGB")
            # Only a JPEG can be drafted. `smaller[1]` is the box of the picture in the decoded area.
            smaller = image.draft(None, (GAP * size[0], GAP * size[1]))
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return rgb.resize(size, self._rule.resample, box=smaller[1] if smaller else None)

    def refusal(self, width: int, height: int) -> str | None:
        """Why the policy's processor refuses pictures of this size; None where it takes them."""
        short, long = sorted((width, height))
        if self._processor is None or (short >= NARROW and long <= ELONGATED * short):
            return None
        if (width, height) not in self._refusals:
            reason = None
            try:
                self._processor(images=[Image.new("RGB", self.size(width, height))])
            except Exception as error:  # each processor has its own
                ratio = f"{width} x {height} pixels, {long / short:.0f} to 1"
                reason = f"the policy's image processor refuses {ratio}: {first_line(error)}"
            self._refusals[width, height] = reason
        return self._refusals[width, height]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which a picture of this size is decoded."""
        rule, whole = self._rule, (width, height)
        if rule is None or not rule.too_large(height, width):
            return whole
        with suppress(ValueError):  # too narrow for the processor: see `refusal`
            final = rule.resized(height, width)
            if rule.resized(*final) == final:
                return final[1], final[0]
            # With close lower and upper bounds, as the tiny policy's, the processor would resize
            # its own result again. A whole fraction of the picture keeps the proportions.
            divisor = max(1, min(height // (GAP * final[0]), width // (GAP * final[1])))
            part = -(-height // divisor), -(-width // divisor)
            if rule.resized(*part) == final:
                return part[1], part[0]
        return whole


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the picture that encoded bytes hold, from their header alone."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def rule_of(own: Any) -> Rule | None:
    """The resize rule of an image processor; None where it is not known for certain.

    Known are a bound on the area (Qwen-VL), a bound on the longest side (Idefics3, SmolVLM), and one
    size for all pictures (Gemma-3). Processors that cut a picture into tiles, such as InternVL's and
    LLaVA-OneVision's, may use all of a large picture.
    """
    if not getattr(own, "do_resize", False) or not isinstance(own.resample, int):
        return None
    module = sys.modules[type(own).__module__]
    size = dict(own.size) if hasattr(own.size, "__getitem__") else {}
    longest, shortest = size.get("longest_edge"), size.get("shortest_edge")
    smart: Any = getattr(module, "smart_resize", None)
    if _takes(smart, QWEN) and longest and shortest and getattr(own, "merge_size", 0):
        bounds = {
            "factor": own.patch_size * own.merge_size,
            "min_pixels": shortest,
            "max_pixels": longest,
        }
        return Rule(
            lambda height, width: height * width > longest,
            lambda height, width: smart(height=height, width=width, **bounds),
            own.resample,
        )
    side: Any = getattr(module, "get_resize_output_image_size", None)
    if _takes(side, IDEFICS) and longest and not shortest:
        return Rule(
            lambda height, width: max(height, width) > longest,
            lambda height, width: side(SimpleNamespace(shape=(height, width)), longest),
            own.resample,
        )
    if size.keys() == {"height", "width"} and not _further_options(own):
        final = (size["height"], size["width"])
        return Rule(
            lambda height, width: height * width > final[0] * final[1],
            lambda *_: final,
            own.resample,
        )
    return None


def _takes(function: Any, names: set[str]) -> bool:
    return callable(function) and set(inspect.signature(function).parameters) == names


def _further_options(own: Any) -> list[str]:
    """The names of further geometric steps that the processor is set to apply."""
    from transformers.processing_utils import ImagesKwargs

    known = getattr(type(own), "valid_kwargs", None)
    if known is None:  # it does not say what it does
        return ["unknown"]
    names = {*known.__annotations__, "do_pad", "do_center_crop"} - (
        ImagesKwargs.__annotations__.keys() - {"do_pad", "do_center_crop"}
    )
    return [name for name in names if getattr(own, name, None)]
