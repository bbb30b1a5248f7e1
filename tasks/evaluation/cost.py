"""What the policies of a comparison spent, from the manifests of what they rest on."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.runtime.errors import StageError

SUPERVISED = ("sft",)  # methods that learn from given answers, so that they sample no completions
EQUAL = ("rollouts", "optimiser_steps", "completions")


def budgets(
    runs: Sequence[Mapping[str, Any]], row_name: Callable[[Mapping[str, Any]], str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """What each row spent, by the set it was trained on: one figure, or a list where seeds differ."""
    spent: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        mine = spent.setdefault(run["trained_on"], {}).setdefault(row_name(run), {})
        for what, amount in _spent(run).items():
            mine.setdefault(what, []).append(amount)
    return {
        place: {
            name: {
                what: amounts[0] if len(set(amounts)) == 1 else amounts
                for what, amounts in by_what.items()
            }
            for name, by_what in by_row.items()
        }
        for place, by_row in spent.items()
    }


def _spent(run: Mapping[str, Any]) -> dict[str, int]:
    trains = [_manifest(path) for path in run["train"]]
    proposes = [_manifest(path) for path in run["propose"]]
    builds = [_manifest(path) for path in run["build_mcq"]]
    steps = [_rows(train, "train_log") for train in trains]
    questions = [
        count * int(train.get("settings", {}).get("questions_per_step", 0))
        for count, train in zip(steps, trains, strict=True)
    ]
    group = [int(train.get("settings", {}).get("num_generations", 0)) for train in trains]
    sampled = sum(q * g for q, g in zip(questions, group, strict=True))
    return {
        "rollouts": sum(_rows(propose, "rollouts") for propose in proposes),
        "optimiser_steps": sum(steps),
        "completions": 0 if run["method"] in SUPERVISED else sampled,
        "questions_built": sum(_rows(build, "mcq") for build in builds),
        "questions_asked": sum(questions),
        "seconds": round(sum(stage.get("seconds") or 0 for stage in (*trains, *proposes))),
    }


def _rows(manifest: Mapping[str, Any], table: str) -> int:
    return int(manifest.get("rows", {}).get(table, 0))


def _manifest(folder: str) -> dict[str, Any]:
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{path} cannot be read ({error}); run its stage again") from error


def unequal(found: Mapping[str, Any], baseline: str) -> list[str]:
    """Each budget in which methods at their last round differ, in words.

    A method that has no use for a budget (supervised training samples no completions, and the open
    question needs no rollouts) spends none of it; that is in the table, and no inequality.
    """
    last = [r["name"] for r in found["rows"] if r["round"] is None and r["method"] != baseline]
    told = []
    for place, by_row in found["budgets"].items():
        for what in EQUAL:
            amounts = {
                name: by_row[name][what] for name in last if name in by_row and by_row[name][what]
            }
            if len({str(amount) for amount in amounts.values()}) > 1:
                listed = ", ".join(f"{name} {_told(amount)}" for name, amount in amounts.items())
                told.append(f"{what.replace('_', ' ')} on {place}: {listed}")
    return told


def _told(amount: int | list[int]) -> str:
    return " / ".join(f"{n:,}" for n in (amount if isinstance(amount, list) else [amount]))
