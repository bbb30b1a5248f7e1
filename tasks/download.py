"""Download: reads and checks the images of a data card, and writes them to Parquet shards.

    python -m tasks.download recipe.json

Writes `images-*.parquet` (one row an image), `rejects.parquet` (one row an unusable file with the
reason; no file where there is none) and the counts in `stats.json`. Every image is decoded in full;
`tasks/ingest/pictures.py` defines which are re-encoded. A few threads decode while the shards are
written, so memory does not grow with the number of images.
"""

import itertools
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_cards import Card, load
from tasks.ingest.folders import described
from tasks.ingest.pictures import Picture, Reject, image_row, open_picture
from tasks.ingest.settings import DownloadSettings
from tasks.ingest.source import Item, Source
from tasks.ingest.sources import open_source, require_every_class
from tasks.language.class_names import ClassNames
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.progress import progress
from tasks.runtime.protocol import STATS_FILE, save_stats
from tasks.tables import schemas, shards
from tasks.tables.durable import write_text

IMAGES_PER_SHARD = 1000
UNPACKED = "unpacked"  # folder below the output for unpacked archives, deleted at the end


def download(
    output: Path,
    *,
    card: str,
    settings: DownloadSettings,
) -> None:
    """Write every image of the card to Parquet shards, and every unusable file to the rejects.

    Missing official archives are downloaded. Raises StageError when the source is missing, when a
    class has no usable image, or when the share of rejected files is too large.
    """
    if (output / STATS_FILE).exists():  # an earlier run finished all but the tidying up
        _tidy(output)
        return
    data_card = load(card)
    try:
        ClassNames(data_card.classes, data_card.aliases)
    except ValueError as error:
        raise StageError(f"card {card}: {error}") from error
    source = open_source(data_card, settings.archives, output / UNPACKED, settings.mirror)
    for line in described(source.left_out):
        print(f"download: {line}")
    count, rejects = _finished(output, source)
    items = source.items(count)
    with (
        shard_by_shard(),
        ThreadPoolExecutor(settings.decode_threads or os.cpu_count() or 1) as pool,
        progress(
            None,
            desc="download",
            total=source.total,
            unit="images",
            done=count,
            shard=IMAGES_PER_SHARD,
        ) as bar,
    ):
        for first in items:  # the rest of its shard is read while it is written
            part = itertools.chain([first], itertools.islice(items, IMAGES_PER_SHARD - 1))
            pictures = _pictures(pool, part, bar.update)
            number, bad = _write_shard(output, count, data_card, source, pictures)
            rejects += bad
            count += number
            # Where the number of images is known, too many rejects show before the end.
            _check_rejects(output, rejects, count, max(count, source.total or 0), settings)
            bar.set_postfix(unusable=len(rejects))
            stop_if_asked()
    _check_rejects(output, rejects, count, count, settings)
    stats: dict[str, Any] = {"images": count - len(rejects), "rejected": len(rejects)}
    stats |= _counts(output, data_card) | ({"revision": source.revision} if source.revision else {})
    if source.left_out:
        stats["left_out"] = {why: len(paths) for why, paths in source.left_out.items()}
    shards.write(output / "rejects.parquet", rejects, schemas.rejects())
    save_stats(output, stats)
    _tidy(output)


def _tidy(output: Path) -> None:
    """Delete the notes and the unpacked archives, which only an unfinished run needs."""
    for path in output.glob("part-*.json"):
        path.unlink()
    shutil.rmtree(output / UNPACKED, ignore_errors=True)


def _finished(output: Path, source: Source) -> tuple[int, list[dict[str, str]]]:
    """How many files an earlier run has processed, and the rejects among them.

    Its shards are kept as long as the source still lists the same files for them. From the first
    shard with other files on, all shards are deleted.
    """
    rejects: list[dict[str, str]] = []
    count = 0
    for index in itertools.count():
        note = _note(output, index)
        if not note.exists():
            break
        recorded = json.loads(note.read_text(encoding="utf-8"))
        if recorded["source"] != _identity(source, count):
            print(
                "download: the source has changed since the run was cut off; going on before that"
            )
            break
        count += recorded["items"]
        rejects += recorded["rejects"]
    for path in (*output.glob("part-*.json"), *output.glob("images-*.parquet")):
        if int(path.stem.rpartition("-")[2].partition("_")[0]) >= -(-count // IMAGES_PER_SHARD):
            path.unlink()
    return count, rejects


def _identity(source: Source, start: int) -> str:
    """A text that identifies the files of the shard that begins at image `start`."""
    return source.revision or source.digest(start, start + IMAGES_PER_SHARD)


def _pictures(
    pool: ThreadPoolExecutor, items: Iterable[Item], advance: Any
) -> Iterator[tuple[Item, Picture | Reject]]:
    """Each item with its picture or Reject, in order. Twice as many are in memory as there are threads."""
    waiting: deque[tuple[Item, Future[Picture | Reject]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(open_picture, item.load, item.crop_bottom)))
        if len(waiting) > 2 * pool._max_workers:
            yield waiting[0][0], waiting.popleft()[1].result()
            advance(1)
    for item, future in waiting:
        yield item, future.result()
        advance(1)


def _write_shard(
    output: Path,
    start: int,
    card: Card,
    source: Source,
    pictures: Iterable[tuple[Item, Picture | Reject]],
) -> tuple[int, list[dict[str, str]]]:
    """Write one shard of images, then the note that it is complete. Returns (file count, rejects)."""
    rejects, count = [], 0
    index = start // IMAGES_PER_SHARD
    path = shards.shard_path(output, "images", index)
    with shards.Writer(path, schemas.images(card.classes)) as writer:
        for item, picture in pictures:
            count += 1
            if isinstance(picture, Reject):
                rejects.append({"path": item.path, "reason": str(picture)})
            else:
                image_id = f"{card.name}/{item.path}"
                writer.add(image_row(image_id, item.path, item.label, item.official_split, picture))
    note = _note(output, index)
    record = {"items": count, "source": _identity(source, start), "rejects": rejects}
    write_text(note, json.dumps(record))
    return count, rejects


def _note(output: Path, index: int) -> Path:
    return output / f"part-{index:05d}.json"


def _check_rejects(
    output: Path,
    rejects: list[dict[str, str]],
    count: int,
    expected: int,
    settings: DownloadSettings,
) -> None:
    """Raise StageError when more than `max_reject_share` of the `expected` files are unusable."""
    if len(rejects) > settings.max_reject_share * expected:
        for note in output.glob("part-*.json"):  # the next run opens these files again
            if json.loads(note.read_text(encoding="utf-8"))["rejects"]:
                note.unlink()
        worst = "; ".join(f"{row['path']}: {row['reason']}" for row in rejects[:10])
        raise StageError(
            f"{len(rejects)} of {count} files are unusable ({len(rejects) / count:.1%}; [Download] "
            f"max_reject_share = {settings.max_reject_share:g}): {worst}"
        )


def _counts(output: Path, card: Card) -> dict[str, Any]:
    """Image counts by official split; prints where they differ from the card's.

    Raises StageError when a class has no usable image.
    """
    labels: set[int] = set()
    by_split: Counter[str] = Counter()
    for path in shards.paths(output, "images"):
        table = shards.read_file(path, ["label", "official_split"])
        labels |= set(table["label"].unique().to_pylist())
        by_split.update(table["official_split"].to_pylist())
    require_every_class(card, labels, "usable image")
    listed = {split: count for split, count in by_split.items() if split}
    if card.official_splits and listed != card.official_splits:
        texts = [
            ", ".join(f"{n} {s}" for s, n in sorted(c.items())) or "no split"
            for c in (listed, card.official_splits)
        ]
        print(
            f"download: usable images: {texts[0]}; the official split of {card.name} has {texts[1]}"
        )
    return {"official_splits": dict(sorted(listed.items()))}


if __name__ == "__main__":
    main(download)
