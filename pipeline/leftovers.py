"""Working folders of runs that were cut off: which of them a run would go on from, and which not.

Such a folder bears the fingerprint of the artifact that it was to become. It is wanted when a stage
has this fingerprint under the settings as they stand, for the dataset and method whose folder it lies
in. Settings given on a command line may want it as well, which nothing here can know: so what no stage
wants goes only when nobody has touched it for some days. One that is worked on always stays.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pipeline import artifact, lock
from pipeline.artifact import DELETED, PARTIAL
from pipeline.settings import SettingsError

DAYS = 7.0


@dataclass(frozen=True)
class Leftover:
    """A working folder: its size, days since anything in it was written, whether it stays, and why."""

    folder: Path
    bytes: int
    days: float
    kept: bool
    why: str


def leftovers(root: Path, older_than: float = DAYS) -> list[Leftover]:
    """Every working folder below `root`; one that no stage wants stays for `older_than` days."""
    found = sorted(_folders(root))
    unknown, wanted = "", {}
    if found:
        try:
            wanted = _wanted(root, found)
        except SettingsError as error:
            unknown = str(error).removeprefix("error: ")
    told = []
    for folder in found:
        size, days = _measure(folder)
        kept, why = _judge(folder, days, wanted, unknown, older_than)
        told.append(Leftover(folder, size, days, kept, why))
    return told


def remove(found: Leftover) -> bool:
    """Delete a working folder, unless a run has taken it up meanwhile; whether it is gone."""
    if found.folder.suffix == DELETED:
        artifact.remove(found.folder)
        return True
    try:
        with lock.held(artifact.lock_of(_final(found.folder)), patience=0):
            if found.folder.exists():  # else a run has just made an artifact of it
                artifact.remove(found.folder)
    except lock.Busy:
        return False
    return True


def _judge(
    folder: Path, days: float, wanted: dict[str, str], unknown: str, older_than: float
) -> tuple[bool, str]:
    """Whether it stays, and why."""
    if folder.suffix == DELETED:
        return False, "its deletion was cut off"
    final = _final(folder)
    if holder := artifact.worked_on_by(final):
        return True, f"{holder} is at work on it"
    if final.exists():
        return False, "its artifact is there"
    if stage := wanted.get(final.name):
        return True, f"a run of {stage} goes on from it"
    if unknown:
        return True, f"whether a run would go on from it cannot be told: {unknown}"
    if days < older_than:
        return True, (
            "no stage goes on from it under these settings; those of a command line or a recipe may: "
            f"it stays until it is {older_than:g} days old"
        )
    return False, "no stage goes on from it under these settings"


def _wanted(root: Path, folders: Iterable[Path]) -> dict[str, str]:
    """Fingerprint -> stage, for all stages that the settings ask for where these folders lie.

    Raises SettingsError when the settings cannot be read.
    """
    from pipeline import status, tasks
    from pipeline.compare import Compare
    from pipeline.settings import check_configuration

    check_configuration()
    default = tasks.TrainDiVE()
    seeds = {default.seed, *Compare().seeds}
    found: dict[str, str] = {}
    asked: set[tuple[str, str, int]] = set()
    for folder in folders:
        dataset, *below = folder.relative_to(root).parts
        if "compare" in (dataset, *below):
            chosen: Iterable[Any] = [Compare(**({"dataset": dataset} if below[1:] else {}))]
        else:
            if dataset == "base_policy":  # of a published model, which is no set's
                dataset = default.dataset
            methods = [m for m in below if m in tasks.METHODS] or [default.method, "dive_k"]
            each = set(product([dataset], methods, seeds | set(_seeds(folder)))) - asked
            asked |= each
            chosen = (task for one in sorted(each) for task in _whole_run(*one))
        with suppress(SettingsError):  # a data card that is no longer there
            for stage in (stage for task in chosen for stage in status.graph(task)):
                found.setdefault(stage.fingerprint, _name(stage))
    return found


def _name(stage: Any) -> str:
    parts = [stage.task_family, getattr(stage, "method", ""), getattr(stage, "refresh_round", None)]
    parts += [stage.dataset, f"seed {seed}" if (seed := getattr(stage, "seed", None)) is not None else None]  # fmt: skip
    return " ".join(str(part) for part in parts if part not in ("", None))


def _whole_run(dataset: str, method: str, seed: int) -> Iterator[Any]:
    """TrainDiVE, and the evaluations of the rounds before the last, as Compare wants them."""
    from pipeline import tasks

    given = {"dataset": dataset, "method": method, "seed": seed}
    yield tasks.TrainDiVE(**given)
    for number in range(tasks.last_round(method) if method != "zero_shot" else 0):
        yield tasks.Evaluate(refresh_round=number, subset="", **given)


def _seeds(folder: Path) -> Iterator[int]:
    """The seeds that the recipe in a working folder can be of; Propose's counts thousands."""
    try:
        seed = json.loads((folder / artifact.RECIPE).read_text(encoding="utf-8")).get("seed")
    except (OSError, ValueError):
        return
    if isinstance(seed, int):
        yield from {seed, seed // 1000}


def _folders(root: Path) -> Iterator[Path]:
    for pattern in (f"*{PARTIAL}", f".*{DELETED}"):
        for folder in root.rglob(pattern):
            above = {parent.suffix for parent in folder.relative_to(root).parents}
            if folder.is_dir() and not folder.is_symlink() and not above & {PARTIAL, DELETED}:
                yield folder


def _final(partial: Path) -> Path:
    """The artifact that a working folder was to become."""
    return partial.with_suffix("")


def _measure(folder: Path) -> tuple[int, float]:
    """Bytes in it, and days since anything in it was written."""
    size, newest = 0, 0.0
    for path in [folder, *folder.rglob("*")]:
        try:
            facts = path.lstat()
        except FileNotFoundError:  # of a run at work on it
            continue
        size += facts.st_size if path.is_file() else 0
        newest = max(newest, facts.st_mtime)
    return size, max(0.0, time.time() - newest) / 86400
