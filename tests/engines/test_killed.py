"""Real engines that are killed in a shard: it is sampled again, and nothing is lost or doubled."""

import contextlib
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.propose import propose
from tasks.runtime.memory import below
from tasks.tables import shards
from tests.conftest import run_stage
from tests.engines.conftest import SETTINGS
from tests.engines.test_pool import every_image_once

pytestmark = pytest.mark.model


def proposed(tiny, output: Path, **changed) -> list[dict]:
    output.mkdir(exist_ok=True)
    run_stage(propose, 
        output, card="few", download=tiny.download, split=tiny.split, policy=tiny.policy,
        engine=replace(SETTINGS, **changed), num_rollouts=20, prompt="open", shard_size=4,
        max_unparsed_share=1.0, fail_fast_unparsed_share=1.0, max_lost_share=0.0, limit=0, seed=0,
    )  # fmt: skip
    return shards.read(output, "rollouts").to_pylist()


def title(process: int) -> str:
    """A process's command line, or what it calls itself; "" of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    return ""


def kill_one(watched: Path, mark: str, which: int = 0) -> threading.Thread:
    """Kill -9 one of our processes, whose command line or title holds `mark`, once two shards are there.

    `which` counts from those that started first.
    """

    def watch() -> None:
        for _ in range(3000):
            if len(list(watched.glob("rollouts-*.parquet"))) >= 2:
                break
            time.sleep(0.05)
        ours = [process for process in below(os.getpid()) if re.search(mark, title(process))]
        os.kill(ours[which], signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_real_engine_killed_in_a_shard_loses_that_shard_at_most(tiny, capfd):
    output = tiny.root / "killed"
    whole = proposed(tiny, tiny.root / "whole", processes=1)
    output.mkdir()
    killer = kill_one(output, "from multiprocessing.spawn")
    rows = proposed(tiny, output, processes=1)
    killer.join()
    assert "the engine ended (killed by SIGKILL" in capfd.readouterr().err
    assert rows == whole, "on a CPU the very same draws"
    assert every_image_once(rows, tiny)


@pytest.mark.parametrize(("which", "how"), [(-1, "killed by SIGKILL"), (0, "exit code")])
def test_a_forked_engine_or_its_server_is_replaced_and_nothing_is_left(tiny, capfd, which, how):
    output = tiny.root / f"forked {which}"
    output.mkdir()
    killer = kill_one(output, "from multiprocessing.forkserver", which)
    rows = proposed(tiny, output, processes=2)
    killer.join()
    assert f"the engine ended ({how}" in capfd.readouterr().err
    assert rows == proposed(tiny, tiny.root / "whole", processes=1), "on a CPU the very same draws"
    left = [title(process) for process in below(os.getpid())]
    assert not [each for each in left if "forkserver" in each]


def test_a_ray_worker_killed_in_the_middle_loses_and_doubles_nothing(tiny):
    output = tiny.root / "ray killed"
    output.mkdir()
    killer = kill_one(output, "ray::.*RayWorker|ray::MapWorker")
    rows = proposed(tiny, output, backend="ray", processes=2)
    killer.join()
    assert every_image_once(rows, tiny)
    assert not list(output.glob("*.tmp"))
