"""Streams datasets of the Hugging Face hub, or local folders in their layout, at a pinned revision.

Nothing is cached: images go from the hub's files straight into our shards. A run that was cut off
resumes after its last finished shard.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_cards import Card
from tasks.ingest.pictures import Reject
from tasks.ingest.source import Item, Source
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import StageError, first_line

SPLITS = {"train": "train", "test": "test"}


class Part(NamedTuple):
    """One split: its name on the hub and ours, its rows, and their number where it is known."""

    name: str
    official: str
    rows: Any  # datasets.IterableDataset
    size: int | None


def open_source(card: Card, source: dict[str, Any]) -> Source:
    """The images of `source`, which has the key repo and optionally revision, config, splits, image, label.

    `splits` maps the hub's split names to ours; `image` and `label` are columns. A repo without a
    revision is read at its newest commit, which the Source records. Raises StageError for a repo
    that cannot be loaded, a missing column, and a class that the card does not have (at once, where
    the hub lists the class names).
    """
    repo = os.path.expanduser(source["repo"])
    revision = source.get("revision") or _newest(card, repo)
    image, label = source.get("image", "image"), source.get("label", "label")
    labels = _Labels(card, source["repo"])
    parts = []
    for name, official in (source.get("splits") or SPLITS).items():
        try:
            rows = _stream(repo, source.get("config"), revision, name)
            features = rows.features or dict.fromkeys(next(iter(rows), {}))
        except Exception as error:  # of the network, the hub, or the files themselves
            raise StageError(
                f"card {card.name}: split {name!r} of {repo} cannot be loaded: {first_line(error)}"
            ) from error
        for column in (image, label):
            if column not in features:
                raise StageError(
                    f"card {card.name}: {repo} has no column {column!r}; it has "
                    f"{', '.join(features)} (`image` and `label` of the source in the card)"
                )
        labels.expect(getattr(features[label], "names", None))
        known = (rows.info.splits or {}).get(name)
        size = known.num_examples if known else None
        parts.append(Part(name, official, _undecoded(rows, image), size))

    def items(start: int) -> Iterator[Item]:
        skip = start
        for part in parts:
            if part.size is not None and part.size <= skip:
                skip -= part.size
                continue
            index = -1
            try:
                for index, row in enumerate(part.rows):
                    if index < skip:
                        continue
                    path = f"{part.name}/{index:07d}"
                    load = partial(_bytes, row[image])
                    yield Item(path, labels.of(row[label]), part.official, load)
            except (StageError, GeneratorExit):
                raise
            except Exception as error:
                raise StageError(
                    f"card {card.name}: {repo} stopped after {index + 1} images of split "
                    f"{part.name!r}: {first_line(error)}; run again to go on"
                ) from error
            skip = max(0, skip - index - 1)

    sizes = [part.size for part in parts]
    total = None if None in sizes else sum(size for size in sizes if size)
    return Source(total, items, "" if Path(repo).is_dir() else str(revision))


class _Labels:
    """Maps a row's label to the card's class id: a number in the hub's own class list, or a text."""

    def __init__(self, card: Card, repo: str):
        self.card, self.repo = card, repo
        self.known = ClassNames(card.classes, card.aliases)
        self.names: list[str] | None = None

    def expect(self, names: list[str] | None) -> None:
        """Take the hub's class list, and raise StageError for a class that the card does not have."""
        self.names = names
        for name in names or ():
            self.of(name)

    def of(self, value: int | str | None) -> int:
        """The class id of a label. Raises StageError for an unknown class or a missing label."""
        text = str(value)
        if self.names and isinstance(value, int):
            text = self.names[value] if 0 <= value < len(self.names) else ""
        if value is None or not text.strip():
            raise StageError(
                f"card {self.card.name}: {self.repo} has an image without a label ({value}); leave "
                "its split out under `splits` of the source"
            )
        class_id = self.known.match(text).class_id
        if class_id is None:  # "001.Black_footed_Albatross"
            class_id = self.known.match(text.lstrip("0123456789").lstrip("._- ")).class_id
        if class_id is None:
            raise StageError(
                f"card {self.card.name}: {self.repo} has the class {text!r}, which is neither a "
                "class of the card nor an alias"
            )
        return class_id


def _stream(repo: str, config: str | None, revision: str | None, split: str) -> Any:
    from datasets import load_dataset

    return load_dataset(repo, config, revision=revision, split=split, streaming=True)


def _undecoded(rows: Any, image: str) -> Any:
    from datasets import Image

    return rows.cast_column(image, Image(decode=False))


def _bytes(image: Any) -> bytes:
    """The bytes of an undecoded image of `datasets`. Raises Reject when there are none."""
    image = image or {}
    if image.get("bytes"):
        return image["bytes"]
    if not image.get("path"):
        raise Reject("the row holds no image")
    import fsspec

    try:
        with fsspec.open(image["path"], "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise Reject("listed, but there is no such file") from error
    except Exception as error:  # of the network
        raise StageError(
            f"{image['path']} cannot be read: {first_line(error)}; run again to go on"
        ) from error


def _newest(card: Card, repo: str) -> str | None:
    """The newest commit of a hub dataset; None for a local folder."""
    if Path(repo).is_dir():
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(repo).sha
    except Exception as error:  # of the network or of the hub
        raise StageError(
            f"card {card.name}: {repo} cannot be found: {first_line(error)}"
        ) from error
