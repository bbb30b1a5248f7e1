"""Estimates how a run's hours fall with more GPUs, and what keeps them from falling.

Every stage waits for the stage before it, and every round for the round before (the refresh barrier).
So each stage pays for itself what more GPUs do not shorten:

- `one machine`: Download reads and checks images on one machine, and BuildMCQ is one process.
- `engine start`: each stage with an engine opens it, and a training with vLLM does.
- `last shard`: engines take whole shards, so that most of them wait for the last ones.
- `small batch`: a step has so many completions, and no completion is on two GPUs.
- `all-reduce`: each step sends the gradients round a ring, 2 (n - 1) / n times their bytes (Patarasu
  and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). Sharded weights take half as much again (ZeRO,
  arXiv 1910.02054).

Not modelled: the stragglers of a step, the longest completions of a shard, a shared disk, and engines
that are slower with few sequences at a time than the rates that were measured with many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Measured on two virtual cores of an AMD EPYC (docs/benchmarks.md): photographs of 500 x 375 pixels
# that Download reads and checks a second, and rollouts that BuildMCQ turns to questions on one core.
DOWNLOADED, BUILT = 1075.0, 260_000
CAUSES = ("work", "one machine", "engine start", "last shard", "small batch", "all-reduce")


@dataclass(frozen=True)
class Rates:
    """What one GPU does in a second, and what more of them do not change. 0: not counted.

    `written` are tokens that an engine writes a second and GPU, `updated` those that go through a
    gradient step, read and written. `start` are the seconds until an engine is ready. `reduced` are
    the bytes a second that each GPU sends in an all-reduce. An engine takes `tensor_parallel` GPUs.
    """

    written: float
    updated: float = 0.0
    start: float = 0.0
    reduced: float = 0.0
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Share:
    """A stage's work: tokens written and updated, in `passes` of `units` pieces each.

    A unit is a shard, which one engine takes, or in training a completion, which one GPU takes; a pass
    is over all shards, or a step. `gradients` are bytes. `alone` are seconds on one machine.
    """

    stage: str
    written: float = 0.0
    updated: float = 0.0
    units: int = 1
    passes: int = 1
    gradients: float = 0.0
    trains: bool = False
    alone: float = 0.0


def seconds(share: Share, gpus: int, rates: Rates) -> dict[str, float]:
    """Cause -> seconds of a stage on so many GPUs; `work` is what an even division would take."""
    if share.alone:
        return dict.fromkeys(CAUSES, 0.0) | {"one machine": share.alone}
    each = 1 if share.trains else rates.tensor_parallel
    engines = max(1, gpus // each)
    alone = share.written / rates.written
    alone += share.updated / rates.updated if rates.updated else 0.0
    even, turns = alone / (engines * each), math.ceil(share.units / engines)
    longer = even * (turns * engines / share.units - 1)
    used = min(gpus, share.units) if share.trains else 0
    sent = 2 * (used - 1) / used * share.gradients if used else 0.0
    return {
        "work": even,
        "one machine": 0.0,
        "engine start": rates.start,
        "last shard": 0.0 if share.trains else longer,
        "small batch": longer if share.trains else 0.0,
        "all-reduce": share.passes * sent / rates.reduced if rates.reduced else 0.0,
    }


def table(shares: Sequence[Share], machines: Sequence[int], rates: Rates) -> list[dict[str, Any]]:
    """For each number of GPUs the hours by stage and by cause, and what breaks first."""
    rows = []
    for gpus in machines:
        of_stage = {share.stage: seconds(share, gpus, rates) for share in shares}
        rows.append(
            {
                "gpus": gpus,
                "stages": {name: sum(one.values()) / 3600 for name, one in of_stage.items()},
                "causes": {
                    cause: sum(one[cause] for one in of_stage.values()) / 3600 for cause in CAUSES
                },
                "first": first_to_break(shares, gpus, rates),
            }
        )
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table for a terminal: a column for each number of GPUs."""
    shown = ["", "GPUs".ljust(28) + "".join(f"{row['gpus']:>12,}" for row in rows)]
    for part, title in (("stages", "{}"), ("causes", "  of these {}")):
        for name in rows[0][part]:
            hours = [row[part][name] for row in rows]
            if any(hours):
                shown.append(title.format(name).ljust(28) + "".join(f"{h:12.2f}" for h in hours))
        if part == "stages":
            sums = [sum(row[part].values()) for row in rows]
            shown.append("hours in all".ljust(28) + "".join(f"{h:12.2f}" for h in sums))
    shown += [f"breaks first on {row['gpus']:,}: {row['first'] or 'nothing'}" for row in rows]
    return shown


def first_to_break(shares: Sequence[Share], gpus: int, rates: Rates) -> str:
    """The largest loss on so many GPUs, in a sentence; "" where nothing is lost."""
    lost = [
        (amount, cause, share)
        for share in shares
        for cause, amount in seconds(share, gpus, rates).items()
        if cause != "work"
    ]
    amount, cause, share = max(lost, key=lambda each: each[0])
    if not amount:
        return ""
    engines = max(1, gpus // rates.tensor_parallel)
    why = {
        "one machine": "which more GPUs do not shorten",
        "engine start": "in which nothing is written",
        "last shard": f"{share.units:,} shards a pass for {engines:,} engines",
        "small batch": f"{share.units:,} completions a step for {gpus:,} GPUs",
        "all-reduce": f"{share.gradients / 1e9:.1f} GB of gradients a step",
    }[cause]
    return f"{share.stage}, {cause}: {amount / 3600:.2f} hours, {why}"
