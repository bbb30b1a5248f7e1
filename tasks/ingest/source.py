"""What every source of images is: how many there are, and a way to go through them from any place on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """One image to ingest: `load` gives its bytes; `official_split` is empty where none is given."""

    path: str
    label: int
    official_split: str
    load: Callable[[], bytes]
    crop_bottom: int = 0  # pixels of a banner that is not part of the picture


@dataclass(frozen=True)
class Source:
    """`items(start)` gives the images from number `start` on, in an order that never changes.

    `total` is their number, or None where only reading tells. `revision` is the commit of a hub
    dataset, else empty; `digest(start, stop)` tells whether a stretch of a list is still the same.
    """

    total: int | None
    items: Callable[[int], Iterator[Item]]
    revision: str = ""
    digest: Callable[[int, int], str] = lambda start, stop: ""
