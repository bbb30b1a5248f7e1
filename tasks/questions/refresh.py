"""Plans a refresh: which images get new rollouts, which keep their old ones, which are retired.

The first round asks about every training image. A later round can leave out the images whose
question the policy has learned to answer, judged by the rewards logged in training, or ask about a
random share only. An image that is not asked again keeps its rollouts, or is retired.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.questions.rollouts import by_block
from tasks.questions.settings import ANSWERED, ProposeSettings
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.ids import Ids


@dataclass(frozen=True)
class Plan:
    """Image ids: `asked` again, `kept` with the previous round's rollouts, or `retired`."""

    asked: Ids
    kept: Ids
    retired: list[str]


def plan(
    image_ids: Ids,
    settings: ProposeSettings,
    *,
    previous: Path | None,
    train: Path | None,
    seed: int,
) -> Plan:
    """Decide what a round does with its images.

    `previous` and `train` are the previous round's Propose and Train artifacts. A question is solved
    when the completions of its latest use earned at least `solved_at` on average. A retired image
    stays retired. Raises StageError when no image is left to ask about.
    """
    if settings.refresh == "all" or previous is None or train is None:
        return Plan(image_ids, Ids([]), [])
    gone = set(_column(previous, "retired", "image_id"))
    left = [image_id for image_id in image_ids if image_id not in gone]
    if settings.refresh == "sample":
        count = max(1, round(settings.refresh_share * len(left)))
        drawn = np.random.default_rng([seed, 1]).choice(len(left), count, replace=False)
        again = {left[i] for i in drawn}
        return Plan(
            Ids([i for i in left if i in again]),
            Ids([i for i in left if i not in again]),
            sorted(gone),
        )
    rewards = latest_rewards(train)
    done = {image_id for image_id, mean in rewards.items() if mean >= settings.solved_at}
    asked = [image_id for image_id in left if image_id not in done]
    rest = [image_id for image_id in left if image_id in done]
    if settings.solved == "keep":
        return Plan(Ids(asked), Ids(rest), sorted(gone))
    if not asked:
        raise StageError(
            f"every question of {train} is solved (solved_at = {settings.solved_at:g}) and retired: nothing is "
            "left to train on; stop at this round, or set [Propose] solved = keep"
        )
    return Plan(Ids(asked), Ids([]), sorted(gone | set(rest)))


def latest_rewards(train: Path) -> dict[str, float]:
    """Image id -> mean answer reward over the completions of its latest use in training.

    Partners, which ask another question's options about the image, do not count.
    Raises StageError where no reward for the answer was logged.
    """
    table = shards.read(train, "completions")
    name = next((f"reward/{r}" for r in ANSWERED if f"reward/{r}" in table.column_names), None)
    if name is None:
        raise StageError(
            f"{train} logged no reward for answers ({', '.join(ANSWERED)}), so that nobody knows "
            "which questions are solved; set [Propose] refresh = all"
        )
    own = [schemas.JOINT not in mcq_id for mcq_id in table["mcq_id"].to_pylist()]
    table = table.filter(pa.array(own, pa.bool_()))
    images = np.array(table["image_id"].to_pylist())
    steps, paid = np.array(table["step"]), np.array(table[name], dtype=float)
    # difficulty_weighted pays up to 2; what counts here is whether the answer was right.
    paid = np.minimum(paid, 1.0)
    ids, inverse = np.unique(images, return_inverse=True)
    latest = np.zeros(len(ids), dtype=steps.dtype)
    np.maximum.at(latest, inverse, steps)
    use = steps == latest[inverse]
    sums = np.bincount(inverse[use], weights=np.nan_to_num(paid[use]), minlength=len(ids))
    counts = np.bincount(inverse[use], minlength=len(ids))
    return dict(zip(ids.tolist(), (sums / counts).tolist(), strict=True))


def merge(
    output: Path, fresh: str, previous: Path, refresh_plan: Plan, order: Ids, size: int
) -> None:
    """Write `rollouts-*` in the order of images: new rollouts where asked, else the previous ones.

    `fresh` is the table of new rollouts, which is deleted at the end. `size` is images a shard. Some
    shards are in memory at a time. Raises StageError where the images of a table are out of order.
    """
    asked, kept = np.zeros((2, len(order)), bool)
    asked[order.positions(refresh_plan.asked)] = True
    kept[order.positions(refresh_plan.kept)] = True
    # How many images of the result stand before each of `order`.
    before = np.concatenate([[0], np.cumsum(asked | kept)])
    new = _wanted(output, fresh, order, asked, size)
    old = _wanted(previous, "rollouts", order, kept, size)
    rows, places, number = schemas.rollouts().empty_table(), np.empty(0, np.int64), 0
    both = heapq.merge(new, old, key=lambda part: part[0])
    for block, parts in itertools.groupby(both, key=lambda part: part[0]):
        tables, positions = zip(*((table, at) for _, table, at in parts), strict=True)
        rows = pa.concat_tables([rows, *tables])
        places = np.concatenate([places, *(before[at] for at in positions)])
        ordered = np.lexsort((np.asarray(rows["rollout"]), places))
        rows, places = rows.take(pa.array(ordered)), places[ordered]
        complete = before[min((block + 1) * size, len(order))]
        while (number + 1) * size <= complete:
            count = int(np.searchsorted(places, (number + 1) * size))
            _write(output, number, rows.slice(0, count))
            rows, places, number = rows.slice(count), places[count:], number + 1
    for last in range(number, -(-int(before[-1]) // size)):
        low, high = np.searchsorted(places, [last * size, (last + 1) * size])
        _write(output, last, rows.slice(low, high - low))
    for path in output.glob(f"{fresh}-*.parquet"):
        path.unlink()


def _write(output: Path, number: int, rows: pa.Table) -> None:
    shards.write(shards.shard_path(output, "rollouts", number), rows, schemas.rollouts())


def _wanted(
    folder: Path, table: str, order: Ids, wanted: NDArray[np.bool_], size: int
) -> Iterator[tuple[int, pa.Table, NDArray[np.int64]]]:
    """The rows of wanted images, as `by_block` has them."""
    parts = by_block(folder, table, order, size, schemas.rollouts().names) if wanted.any() else ()
    for block, batch, positions in parts:
        use = wanted[positions]
        yield block, pa.Table.from_batches([batch]).filter(pa.array(use)), positions[use]


def write_retired(output: Path, refresh_plan: Plan) -> None:
    """Write `retired.parquet`, the retired images; no file where there are none."""
    rows = [{"image_id": image_id, "reason": "solved"} for image_id in refresh_plan.retired]
    shards.write(output / "retired.parquet", rows, schemas.refused())


def retired(propose: Path) -> set[str]:
    """The images that a Propose artifact has retired."""
    return set(_column(propose, "retired", "image_id"))


def _column(folder: Path, table: str, column: str) -> list[Any]:
    path = folder / f"{table}.parquet"
    return shards.read_file(path)[column].to_pylist() if path.exists() else []
