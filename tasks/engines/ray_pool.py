"""A worker pool on a cluster: Ray Data hands the shards to workers, each with its own engine.

The workers read images and write shards themselves, so all machines need the artifact folder at the
same path. Ray replaces a worker that dies and hands its shard out again; a shard that is already on
disk is not answered twice.
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
from tasks.engines.worker import Shard, ShardReport, Worker
from tasks.runtime.errors import ShardError, StageError, first_line

CPU_SHARE = 0.5  # cores for each worker, so that Ray's reader always gets a share of one


class RayPool:
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
        """Answer all shards of `todo`. Each worker checks `probe` first."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        each = self._settings.tensor_parallel_size
        gpus = int(ray.cluster_resources().get("GPU", 0)) // each
        resources = {"num_gpus": each} if gpus else {}
        # A worker is sent its shards one by one, so that it need not hold those of the whole set.
        items = [{"shard": shard} for shard in todo]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        results = data.map_batches(
            RayWorker,
            fn_constructor_args=(self._policy, self._settings, probe),
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
                ShardReport(
                    row["worker"],
                    row["shard"],
                    row["images"],
                    row["refused"],
                    row["busy"],
                    dict(row["counts"] or {}),
                )
            )

    def close(self) -> None:
        """Shut the cluster down, if this process started it."""
        import ray

        if self._started and ray.is_initialized():
            ray.shutdown()


class RayWorker:
    """A worker in a Ray actor, which Ray calls with one shard at a time."""

    def __init__(self, policy: Path, settings: EngineSettings, probe: Shard):
        self._worker = Worker(lambda: open_engine(policy, settings))
        self._probe, self._checked = probe, False

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer the batch's only shard."""
        shard: Shard = batch["shard"][0]
        reports: list[ShardReport] = []
        error = ""
        try:
            if not self._checked:
                self._worker.check(self._probe)
                self._checked = True
            if shard.path.exists():  # an earlier worker died after it had written the shard
                reports.append(ShardReport("", shard.number, len(shard.queries), 0, 0.0, {}))
            else:
                self._worker.work([shard], reports.append)
                shard.path.with_suffix(".died").unlink(missing_ok=True)
        except (StageError, ShardError, CardError) as reason:
            error = str(reason)
        except (EngineDied, MemoryError) as reason:
            # Ray would retry in this process without end; a new process can succeed.
            deaths = shard.path.with_suffix(".died")
            with deaths.open("a") as file:
                file.write("x")
            if deaths.stat().st_size < ATTEMPTS:
                os._exit(DIED)
            deaths.unlink()
            error = f"the engine died {ATTEMPTS} times on shard {shard.number}: {reason}"
        done = reports[0] if reports else ShardReport("", shard.number, 0, 0, 0.0, {})
        return {
            "worker": [done.worker],
            "shard": [done.shard],
            "images": [done.images],
            "refused": [done.refused],
            "busy": [done.busy],
            "counts": [{"prompt_tokens": 0, "cached_tokens": 0, **done.counts}],
            "error": [error],
        }
