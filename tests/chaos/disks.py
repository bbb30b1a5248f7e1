"""A disk that is full, read-only, elsewhere, forbidden or oddly named."""

import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos import world
from tests.chaos.figures import Figure

STAGES = ("Download", "Split", "Propose", "BuildMCQ", "Evaluate", "Report")


def disk(root: Path, long: bool) -> list[Figure]:
    """A disk that is full at points all along the line, and then has room again."""
    unbroken = _unbroken(root / "unbroken")
    need = sum(size for _, size in unbroken.values())
    points = 20 if long else 2
    failed = zero = sentences = completed = damaged = differ = 0
    for point in range(points):
        home = root / f"full{point}"
        world.enter(home)
        size = int(need * (point + 0.5) / points)
        with _small_disk(home / "artifacts", size) as (limit, enlarge):
            stages = list(_chosen())
            stopped = _first_failure(stages, limit)
            if stopped is None:
                completed += 1
            else:
                stage, code, sentence = stopped
                failed += 1
                zero += code == 0
                sentences += "\n" not in sentence and "make room and run again" in sentence
                if "\n" in sentence or "make room" not in sentence:
                    print(f"disk: {stage.task_family}: {sentence}")
                damaged += stage.folder.exists() or len(_problems(home / "artifacts"))
            enlarge()
            again = _first_failure(stages, None)
            if again is not None:
                print(f"disk: after room was made: {again[2]}")
                damaged += 1
                continue
            for stage in stages[:-1]:  # a report tells of times
                found = world.contents(stage.folder)
                expected = unbroken[stage.task_family][0]
                differ += sum(found.get(k) != expected.get(k) for k in {*found, *expected})
        world.make_writable(home)
        shutil.rmtree(home, ignore_errors=True)
    return [
        Figure("disk", "points at which the disk was full", failed + completed),
        Figure("disk", "runs that failed there", failed, points),
        Figure("disk", "of these, with exit code 0", zero, 0),
        Figure("disk", "with one sentence that says what to do", sentences, failed),
        Figure("disk", "artifacts marked complete or damaged", damaged, 0),
        Figure("disk", "files that differ after room was made", differ, 0),
    ]


def places(root: Path, long: bool) -> list[Figure]:
    """Roots that are odd: each works, or ends in one clear sentence."""
    from pipeline.artifacts import store  # noqa: F401 - before any fork changes the clock

    told = []
    cases: dict[str, Callable[[Path], Any]] = {
        "spaces and non-ASCII letters": lambda home: home / "mes données ü 蝶" / "artifacts",
        "a symlinked root": _symlinked,
        "a root on another filesystem": _elsewhere,
        "a read-only root": _read_only,
        "a root without permission": _forbidden,
        "clock jumps": lambda home: home / "artifacts",
    }
    for name, prepare in cases.items():
        home = root / "".join(c for c in name if c.isalnum())
        if "permission" in name:  # where others may look, too
            home = Path(tempfile.mkdtemp(prefix="chaos-"))
        home.mkdir(parents=True, exist_ok=True)
        place = prepare(home)
        world.enter(home, artifacts=str(place))
        before = _jump if name == "clock jumps" else _drop if "permission" in name else None
        sentence = ""
        for stage in list(_chosen())[:4]:
            if sentence := _run(stage, before)[1]:
                break
        ok = not sentence
        if name in ("a read-only root", "a root without permission"):
            ok = "\n" not in sentence.strip() and "make it writable" in sentence
        if not ok:
            print(f"places: {name}: {sentence}")
        told.append(Figure("places", f"{name}: works, or one sentence", int(ok), 1))
        for mounted in ("ro", "other"):
            subprocess.run(["umount", "-l", home / mounted], capture_output=True)
        if "permission" in name:
            os.chdir(root)
            shutil.rmtree(home)
    return told


def _chosen() -> Iterator[Any]:
    made = world.stages()
    world.preload(made[name] for name in STAGES)
    return (made[name] for name in STAGES)


def _unbroken(home: Path) -> dict[str, tuple[dict[str, str], int]]:
    """Contents and bytes of each stage of a line that nothing happened to."""
    world.enter(home)
    return {
        stage.task_family: (found, sum(p.stat().st_size for p in stage.folder.rglob("*")))
        for stage, _, found in world.timed(list(_chosen()))
    }


def _first_failure(stages: list[Any], limit: int | None) -> tuple[Any, int, str] | None:
    before = None if limit is None else lambda: _limit(limit)
    for stage in stages:
        if stage.folder.exists():
            continue
        code, sentence = _run(stage, before)
        if code != 0 or sentence:
            return stage, code, sentence
    return None


def _run(stage: Any, before: Callable[[], None] | None) -> tuple[int, str]:
    """Exit code and sentence of a stage that runs after `before`, in its own process."""
    Path("sentence.txt").unlink(missing_ok=True)

    def work() -> None:
        if before:
            before()
        world.build(stage)

    process = world.start(work)
    code = world.wait(process, 120)
    if code is None:
        world.kill(process)
        return -1, "it hangs"
    sentence = Path("sentence.txt")
    return code, sentence.read_text() if sentence.exists() else ""


def _problems(root: Path) -> list[str]:
    from pipeline.cli import status, verify

    return verify.check(root, list(status.artifacts(root)))


@contextmanager
def _small_disk(place: Path, size: int) -> Iterator[tuple[int | None, Callable[[], Any]]]:
    """A filesystem of `size` bytes; where it cannot be mounted, a limit to the size of a file."""
    place.mkdir(parents=True)
    options = f"size={max(65536, size)}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield max(2000, size // 20), lambda: None
        return
    try:
        room = ["mount", "-o", "remount,size=1g", str(place)]
        yield None, lambda: subprocess.run(room, check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _symlinked(home: Path) -> Path:
    (home / "real").mkdir()
    (home / "link").symlink_to("real")
    return home / "link" / "artifacts"


def _elsewhere(home: Path) -> Path:
    (home / "other").mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(home / "other")]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        return home / "other"
    shared = Path("/dev/shm") / f"chaos-{os.getpid()}"
    shared.mkdir(exist_ok=True)
    return shared


def _read_only(home: Path) -> Path:
    place = home / "ro"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        place.chmod(0o555)
    return place


def _forbidden(home: Path) -> Path:
    place = home / "theirs"
    place.mkdir(mode=0o755)
    (home / "attempts.log").touch()
    for path in (home / "attempts.log", home):
        path.chmod(0o777)
    if os.geteuid():
        place.chmod(0o555)
    return place


def _drop() -> None:
    """Give up the rights of root: nobody may write there."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def _jump() -> None:
    """A clock that goes a year ahead or back at every look."""
    import time

    real, draw = time.time, random.Random(0)
    time.time = lambda: real() + draw.choice([-1, 1]) * 365 * 86400  # type: ignore[assignment]
