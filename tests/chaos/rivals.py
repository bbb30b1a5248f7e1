"""Several of the same at once, and engines that die in the middle of a shard."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos import world
from tests.chaos.figures import Figure
from tests.fakes import AILS


def races(root: Path, long: bool) -> list[Figure]:
    """Two and five identical runs at once: each artifact is committed once."""
    world.enter(root, lock_patience="60")
    made = world.stages()
    names = ("Download", "Split", "Propose", "BuildMCQ")
    chosen = [made[name] for name in (names if long else names[:2])]
    world.preload(chosen)
    unbroken = {stage: found for stage, _, found in world.timed(chosen)}
    count = 50 if long else 2
    commits: Counter[str] = Counter()
    failed = different = left = 0
    for race in range(count):
        for stage in chosen:
            world.discard(stage)
        rivals = 5 if race % 2 else 2
        processes = [world.start(lambda: _line(chosen)) for _ in range(rivals)]
        failed += sum(world.wait(process, 240) != 0 for process in processes)
        for stage in chosen:
            found = world.contents(stage.folder)
            expected = unbroken[stage]
            different += sum(found.get(k) != expected.get(k) for k in {*found, *expected})
            left += len(world.leftovers(stage))
        for line in Path("commits.txt").read_text().splitlines():
            commits[f"{race} {line}"] += 1
        Path("commits.txt").unlink()
    told = [
        Figure("races", "races of two and of five", count),
        Figure("races", "artifacts", len(commits), len(chosen) * count),
        Figure("races", "committed more than once", sum(n > 1 for n in commits.values()), 0),
        Figure("races", "runs that failed", failed, 0),
        Figure("races", "files that differ from unbroken", different, 0),
        Figure("races", "leftovers", left, 0),
    ]
    return told + (_commands(root / "commands") if long else [])


def _line(stages: list[Any]) -> None:
    """All stages in turn, as a worker does them; notes what it commits itself."""
    from pipeline.artifacts import store

    commit = store.commit

    def noting(partial: Path, folder: Path, manifest: dict) -> None:
        commit(partial, folder, manifest)
        with open("commits.txt", "a") as file:
            file.write(f"{folder.name}\n")

    store.commit = noting
    for stage in stages:
        world.build(stage)


def _commands(root: Path) -> list[Figure]:
    """The same with the real command, five at once."""
    world.enter(root, lock_patience="120")
    command = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", "BuildMCQ"]
    logs = [open(f"command{i}.log", "wb") for i in range(5)]  # noqa: SIM115
    running = [subprocess.Popen(command, stdout=log, stderr=log) for log in logs]
    codes = [process.wait() for process in running]
    for log in logs:
        log.close()
    lines = [Path(log.name).read_text() for log in logs]
    built = sum(len(re.findall(r"build_mcq: \d+ questions from", text)) for text in lines)
    return [
        Figure("races", "five real commands: exit codes other than 0", sum(map(bool, codes)), 0),
        Figure("races", "five real commands: times that the questions were built", built, 1),
    ]


def engines(root: Path, long: bool) -> list[Figure]:
    """The engine's process killed, or out of memory, in the middle of a shard."""
    world.enter(root)
    made = world.stages()
    list(world.timed([made[name] for name in ("Download", "Split")]))
    told = []
    kinds: tuple[tuple[str, dict], ...] = (("killed", {}), ("out of memory", {"give_up": True}))
    for kind, ails in kinds if long else kinds[:1]:
        deaths = 3 if long else 1
        for death in range(deaths):
            name = f"{''.join(kind.split())}{death}"
            notes = root / f"notes-{name}"
            notes.mkdir()
            ill = f"{['emerald', 'amber', 'rose'][death]} gold-belt/0001"
            settings = {"notes": str(notes), "kill": ill, "deaths": 1, **ails}
            rows, asked, expected = _propose(root / name, made, settings)
            again = sum(asked.values()) - len(asked)
            told += [
                Figure("engines", f"{kind} at {ill}: rollouts", rows, expected),
                Figure("engines", f"{kind} at {ill}: shards asked again", again, 1, at_most=True),
            ]
    return told


def _propose(output: Path, made: dict, ails: dict) -> tuple[int, Counter[str], int]:
    """Distinct rollouts of a Propose whose engine ails, shards by how often they were asked."""
    from tasks.tables import shards
    from tasks.tables.split_table import select

    arguments = made["Propose"].arguments() | {
        "output": str(output),
        "shard_size": 24,
        "max_lost_share": 0.0,
    }
    arguments["engine"] |= {"backend": "tests.fakes:isolated", "processes": 1}
    config = output.with_suffix(".json")
    config.write_text(json.dumps(arguments))
    subprocess.run(
        [sys.executable, "-m", "tasks.propose", str(config)],
        check=True,
        capture_output=True,
        env={**os.environ, AILS: json.dumps(ails)},
    )
    rows = shards.read(output, "rollouts", ["image_id", "rollout"]).to_pylist()
    distinct = {(row["image_id"], row["rollout"]) for row in rows}
    wanted = len(select(Path(arguments["split"]), "train", ("base",)))
    asked = Counter((Path(ails["notes"]) / "asked").read_text().splitlines())
    by_keys: Counter[str] = Counter()
    for line, number in asked.items():
        by_keys[line.split(" ", 1)[1]] += number
    doubled = len(rows) - len(distinct)
    return len(distinct) + doubled, by_keys, wanted * arguments["num_rollouts"]


def downloads(root: Path, long: bool) -> list[Figure]:
    """Slow, cut, wrong, redirected and endless downloads: the tests of the archives."""
    from tests.conftest import ROOT

    if not long:
        return []  # the test suite runs them by itself
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ingest/test_archives.py"]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = ran.stdout.strip().splitlines()[-1]
    return [
        Figure("downloads", "tests that failed", ran.returncode, 0),
        Figure("downloads", "tests", told),
    ]
