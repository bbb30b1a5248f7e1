"""The improvement over several training seeds: the whole line, once per seed, then one table.

    python -m tests.bench.seeds 0 1 2              # runs what is missing, then compares
    python -m tests.bench.seeds 0 1 2 --dataset my_birds

A seed decides the base policy, its proposals, the order of questions and all sampling; the images
are the same for all. Differences are paired image by image. Intervals hold 95 %: images are drawn
with replacement, the seeds stay as they are; the spread over seeds stands beside them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import luigi
import numpy as np
from numpy.typing import NDArray

from pipeline.tasks import Report
from tasks import shards
from tasks.metrics import RESAMPLES
from tasks.schemas import GROUPS

Outcomes = NDArray[np.bool_]  # (seeds, images)


def compare(
    before: dict[str, Outcomes], after: dict[str, Outcomes]
) -> list[tuple[str, NDArray, NDArray, float, float]]:
    """(name, before, after, low, high) for each group and for the harmonic mean.

    `before` and `after` hold one accuracy per seed; low and high bound the mean difference.
    """
    rng = np.random.default_rng(0)
    drawn = {
        g: rng.integers(0, before[g].shape[1], (RESAMPLES, before[g].shape[1])) for g in GROUPS
    }
    rows = []
    shares: list[dict[str, NDArray]] = []
    for outcomes in (before, after):
        full = {g: outcomes[g].mean(axis=1) for g in GROUPS}
        again = {g: np.stack([o[drawn[g]].mean(axis=1) for o in outcomes[g]]) for g in GROUPS}
        shares.append({**full, **{f"{g} drawn": again[g] for g in GROUPS}})
    for side in shares:
        side["harmonic mean"] = _harmonic(*(side[g] for g in GROUPS))
        side["harmonic mean drawn"] = _harmonic(*(side[f"{g} drawn"] for g in GROUPS))
    for name in (*GROUPS, "harmonic mean"):
        change = (shares[1][f"{name} drawn"] - shares[0][f"{name} drawn"]).mean(axis=0)
        low, high = np.percentile(change, (2.5, 97.5))
        rows.append((name, shares[0][name], shares[1][name], float(low), float(high)))
    return rows


def _harmonic(base: NDArray, novel: NDArray) -> NDArray:
    return 2 * base * novel / np.maximum(base + novel, 1e-12)


def outcomes(report: Report, number: int, mode: str) -> dict[str, list[bool]]:
    """Right or wrong of every image in the order of ids, by group, of one policy in one mode."""
    recipe = json.loads((report.folder / "recipe.json").read_text())
    rows = shards.read(Path(recipe["evaluations"][number]["path"]), "predictions").to_pylist()
    places = shards.read(Path(recipe["split"]), "split", ["image_id", "group"]).to_pylist()
    group = {row["image_id"]: row["group"] for row in places}
    rows = sorted((r for r in rows if r["mode"] == mode), key=lambda r: r["image_id"])
    return {g: [r["correct"] for r in rows if group[r["image_id"]] == g] for g in GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--dataset", default=luigi.configuration.get_config().get("run", "dataset"))
    given = parser.parse_args()
    reports = []
    for seed in given.seeds:
        line = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", "TrainDiVE"]
        chosen = ["--dataset", given.dataset, "--seed", str(seed)]
        subprocess.run([*line, *chosen], check=True)
        reports.append(Report(dataset=given.dataset, seed=seed))
    for mode in ("one_step", "two_step", "majority"):
        sides = []
        for number in (0, -1):
            each = [outcomes(report, number, mode) for report in reports]
            sides.append({g: np.array([o[g] for o in each]) for g in GROUPS})
        sizes = ", ".join(f"{sides[0][g].shape[1]} {g}" for g in GROUPS)
        print(f"\n{mode}: seeds {given.seeds}, {sizes} images; accuracy in %")
        for name, before, after, low, high in compare(*sides):
            change = 100 * (after - before)
            pairs = ", ".join(
                f"{100 * b:.1f} -> {100 * a:.1f}" for b, a in zip(before, after, strict=True)
            )
            spread = f", sd over seeds {change.std(ddof=1):.1f}" if len(change) > 1 else ""
            print(
                f"  {name:14s} {100 * before.mean():.1f} -> {100 * after.mean():.1f}  "
                f"{change.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{spread}   ({pairs})"
            )


if __name__ == "__main__":
    main()
