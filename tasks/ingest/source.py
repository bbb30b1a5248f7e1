"""The interface of every image source: the number of images, and an iterator from any index on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Item:
    """One image to ingest. `load` returns its bytes; `official_split` is "" where there is none."""

    path: str
    label: int
    official_split: str
    load: Callable[[], bytes]
    crop_bottom: int = 0  # pixel rows of a banner below the picture


@dataclass(frozen=True)
class Source:
    """`items(start)` iterates over the images from number `start` on, always in the same order.

    `total` is their number, None where it is not known beforehand. `revision` is the commit of a hub
    dataset, else "". `digest(start, stop)` is a hash of part of a list, which shows changes.
    `left_out` maps a reason to the files of a folder that are not among the images for it.
    """

    total: int | None
    items: Callable[[int], Iterator[Item]]
    revision: str = ""
    digest: Callable[[int, int], str] = lambda start, stop: ""
    left_out: dict[str, list[str]] = field(default_factory=dict)
