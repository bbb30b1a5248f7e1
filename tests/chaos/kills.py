"""kill -9 of the whole process group at random moments, in every stage."""

import random
import shutil
from pathlib import Path
from typing import Any

from tests.chaos import world
from tests.chaos.figures import Figure

LONG, SHORT = 200, 4  # kills a stage
KILLS_IN_A_ROW = 4


def kills(root: Path, long: bool, only: tuple[str, ...] = ()) -> list[Figure]:
    """Kill each stage at moments drawn over its whole length, then let it run to its end.

    Compared with an unbroken run: every file byte by byte, and the shards that were finished when
    a kill came, which nobody may write again.
    """
    world.enter(root)
    made = world.stages()
    chosen = [name for name in made if name in only or not only]
    if not long and not only:
        chosen = [name for name in chosen if name not in world.WITH_MODEL]
    figures = []
    world.preload(made[name] for name in chosen)
    if "Train" in chosen:
        world.preload([made["BasePolicy"]])
    for name, stage in made.items():
        needed = name in chosen or name not in world.WITH_MODEL or "Train" in chosen
        if not needed:
            continue
        ((_, seconds, unbroken),) = list(world.timed([stage]))
        if name not in chosen:
            continue
        count = LONG if long else SHORT
        figures += _one_stage(name, stage, seconds, unbroken, count)
    return figures


def _one_stage(
    name: str, stage: Any, seconds: float, unbroken: dict[str, str], count: int
) -> list[Figure]:
    draw = random.Random(f"kills {name}")
    first = world.rows(stage.folder)
    killed = finished = different = left = lost = doubled = failed = 0
    again: list[int] = [0]
    partial = stage.folder.with_name(f"{stage.folder.name}.partial")
    while killed < count:
        world.discard(stage)
        for number in range(min(KILLS_IN_A_ROW, count - killed) + 1):
            there = _finished(partial)
            process = world.start(lambda: world.build(stage))
            last = number == min(KILLS_IN_A_ROW, count - killed)
            if world.wait(process, 240 if last else draw.uniform(0, 1.05 * seconds)) is None:
                world.kill(process)
                killed += 1
            now = _finished(stage.folder if stage.folder.exists() else partial)
            again.append(sum(now.get(path) != at for path, at in there.items()))
            if stage.folder.exists():
                break
        if sentence := world.run(stage):
            failed += 1
            print(f"{name}: {sentence}", flush=True)
            shutil.rmtree(partial, ignore_errors=True)
            continue
        finished += 1
        found, now = world.contents(stage.folder), world.rows(stage.folder)
        different += sum(found.get(key) != unbroken.get(key) for key in {*found, *unbroken})
        off = [now.get(key, 0) - first.get(key, 0) for key in {*now, *first}]
        lost -= sum(number for number in off if number < 0)
        doubled += sum(number for number in off if number > 0)
        left += len(world.leftovers(stage))
    told = [
        ("kills", killed, None),
        ("runs that did not come to their end afterwards", failed, 0),
        ("shards on disk that were done again", sum(again), None),
        ("shards done again after one kill, at most", max(again), 1),
        ("rows lost", lost, 0),
        ("rows doubled", doubled, 0),
        (f"files that differ from unbroken, in {finished} artifacts", different, 0),
        ("leftovers", left, 0),
    ]
    return [
        Figure("kills", f"{name}: {figure}", value, goal, at_most=goal == 1)
        for figure, value, goal in told
    ]


def _finished(folder: Path) -> dict[str, int]:
    """When each finished shard was written; single tables are written anew with their stage."""
    tables = ("images", "rollouts", "candidates", "one_step", "two_step")
    return {
        path.name: path.stat().st_mtime_ns
        for table in tables
        for path in folder.glob(f"{table}-[0-9]*.parquet")
    }
