"""A cluster: Ray Data gives the shards to workers, each with an engine of its own.

The workers read and write the shards themselves, so all of them need the artifact folder at the
same path. A worker that dies is replaced and its shard given again; a shard that is already on
disk is not worked off twice.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_cards import CardError
from tasks.engines.backends import open_engine
from tasks.engines.base import EngineDied
from tasks.engines.pool import ATTEMPTS, DIED, OnDone, Ready
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Done, Shard, Station
from tasks.runtime.errors import ShardError, StageError, first_line

CPU_SHARE = 0.5  # of a core for each worker, so that the reader is never starved of one


class RayCrew:
    """Workers on `[engine] ray_address`, or on a cluster started on this machine."""

    def __init__(self, policy: Path, settings: EngineSettings):
        try:
            import ray
        except ImportError as error:
            raise StageError(
                "[engine] backend = ray needs Ray: pip install 'dive-k[ray]'"
            ) from error
        self._policy, self._settings = policy, settings
        self._started = not ray.is_initialized()
        if self._started:
            address = settings.ray_address or None
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    **({} if address else {"include_dashboard": False}),
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise StageError(
                    f"[engine] ray_address = {address}: {first_line(error)}"
                ) from error

    def run(self, todo: Sequence[Shard], probe: Shard, on_ready: Ready, on_done: OnDone) -> None:
        """Work off `todo`, after each worker has checked `probe`."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        each = self._settings.tensor_parallel_size
        gpus = int(ray.cluster_resources().get("GPU", 0)) // each
        resources = {"num_gpus": each} if gpus else {}
        items = [{"number": number} for number in range(len(todo))]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        results = data.map_batches(
            RayStation,
            fn_constructor_args=(self._policy, self._settings, list(todo), probe),
            batch_size=1,
            concurrency=min(len(todo), self._settings.processes or max(1, gpus)),
            num_cpus=CPU_SHARE,
            **resources,
        )
        for row in results.iter_rows():
            on_ready()
            if row["error"]:
                raise StageError(row["error"])
            on_done(
                Done(
                    row["station"],
                    row["shard"],
                    row["images"],
                    row["refused"],
                    row["busy"],
                    dict(row["counts"] or {}),
                )
            )

    def close(self) -> None:
        """End the cluster, if it was started here."""
        import ray

        if self._started and ray.is_initialized():
            ray.shutdown()


class RayStation:
    """One worker: a station that is given one shard at a time."""

    def __init__(self, policy: Path, settings: EngineSettings, todo: list[Shard], probe: Shard):
        self._station = Station(lambda: open_engine(policy, settings))
        self._todo, self._probe, self._checked = todo, probe, False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Work off the shard whose place in the list is the batch's only number."""
        shard = self._todo[int(batch["number"][0])]
        told: list[Done] = []
        error = ""
        try:
            if not self._checked:
                self._station.check(self._probe)
                self._checked = True
            if shard.path.exists():  # by a worker that died after it had written it
                told.append(Done("", shard.number, len(shard.asks), 0, 0.0, {}))
            else:
                self._station.work([shard], told.append)
                shard.path.with_suffix(".died").unlink(missing_ok=True)
        except (StageError, ShardError, CardError) as reason:
            error = str(reason)
        except (EngineDied, MemoryError) as reason:
            # Ray would try again for ever, and in this process; a fresh one has another chance.
            deaths = shard.path.with_suffix(".died")
            with deaths.open("a") as file:
                file.write("x")
            if deaths.stat().st_size < ATTEMPTS:
                os._exit(DIED)
            deaths.unlink()
            error = f"the engine died {ATTEMPTS} times on shard {shard.number}: {reason}"
        done = told[0] if told else Done("", shard.number, 0, 0, 0.0, {})
        return {
            "station": [done.station],
            "shard": [done.shard],
            "images": [done.images],
            "refused": [done.refused],
            "busy": [done.busy],
            "counts": [{"prompt_tokens": 0, "cached_tokens": 0, **done.counts}],
            "error": [error],
        }
