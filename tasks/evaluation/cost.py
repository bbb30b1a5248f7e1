"""Computes the budgets of compared policies from manifests: rollouts, steps, completions, seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.tables import manifest
from tasks.tables.manifest import Manifest

SUPERVISED = ("sft",)  # methods that sample no completions, since they learn from labels
EQUAL = ("rollouts", "optimiser_steps", "completions")  # budgets that a fair comparison has alike


def row_name(run: Mapping[str, Any]) -> str:
    """A row's name: the method, or the method after one of its rounds, with its mark if it has one."""
    name = run["method"] if run["round"] is None else f"{run['method']}, round {run['round']}"
    return f"{name} ({run['mark']})" if run.get("mark") else name


def budgets(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The budgets of each row, by training set: one figure, or a list where seeds differ."""
    spent: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        mine = spent.setdefault(run["trained_on"], {}).setdefault(row_name(run), {})
        for budget, amount in _spent(run).items():
            mine.setdefault(budget, []).append(amount)
    return {
        trained_on: {
            name: {
                budget: amounts[0] if len(set(amounts)) == 1 else amounts
                for budget, amounts in by_budget.items()
            }
            for name, by_budget in by_row.items()
        }
        for trained_on, by_row in spent.items()
    }


def _spent(run: Mapping[str, Any]) -> dict[str, int]:
    trains = [manifest.read(Path(path)) for path in run["train"]]
    proposes = [manifest.read(Path(path)) for path in run["propose"]]
    builds = [manifest.read(Path(path)) for path in run["build_mcq"]]
    steps = [_rows(train, "train_log") for train in trains]
    questions = [
        count * int(train.settings.get("questions_per_step", 0))
        for count, train in zip(steps, trains, strict=True)
    ]
    group = [int(train.settings.get("num_generations", 0)) for train in trains]
    sampled = sum(q * g for q, g in zip(questions, group, strict=True))
    return {
        "rollouts": sum(_rows(propose, "rollouts") for propose in proposes),
        "optimiser_steps": sum(steps),
        "completions": 0 if run["method"] in SUPERVISED else sampled,
        "questions_built": sum(_rows(build, "mcq") for build in builds),
        "questions_asked": sum(questions),
        "seconds": round(sum(stage.seconds or 0 for stage in (*trains, *proposes))),
    }


def _rows(stage: Manifest, table: str) -> int:
    return int(stage.rows.get(table, 0))


def unequal(contents: Mapping[str, Any], baseline: str) -> list[str]:
    """A sentence for each budget in which the methods differ after their last round.

    Methods that spend none of a budget are left out: supervised training samples no completions, and
    the open question needs no rollouts. `contents` are those of compare.json.
    """
    last = [r["name"] for r in contents["rows"] if r["round"] is None and r["method"] != baseline]
    sentences = []
    for trained_on, by_row in contents["budgets"].items():
        for budget in EQUAL:
            amounts = {
                name: by_row[name][budget]
                for name in last
                if name in by_row and by_row[name][budget]
            }
            if len({str(amount) for amount in amounts.values()}) > 1:
                listed = ", ".join(f"{name} {_formatted(n)}" for name, n in amounts.items())
                sentences.append(f"{budget.replace('_', ' ')} on {trained_on}: {listed}")
    return sentences


def _formatted(amount: int | list[int]) -> str:
    return " / ".join(f"{n:,}" for n in (amount if isinstance(amount, list) else [amount]))
