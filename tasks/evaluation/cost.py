"""Computes what policies cost: their budgets, from manifests, and the length of their thoughts."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.language.answers import reasoning
from tasks.tables import manifest, shards
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


def thoughts(
    folder: Path, policy: Path, images: Sequence[str], modes: Sequence[str]
) -> dict[str, Any]:
    """The mean length of a policy's thoughts by mode, from the completions of an evaluation's `folder`.

    `answer` is the mean over the answers that a mode asks for (its samples, for majority), and `image` that
    over the `images`, of all answers that the mode takes for one: also of the samples behind a question.
    A thought is counted in the policy's tokens, or in words where its folder has no tokenizer.json; `unit`
    says which. A bare letter (constrained) has no thought.
    """
    file = policy / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def lengths(table: str) -> dict[str, list[int]]:
        """Image id -> the length of each thought; empty where nothing was asked."""
        by_image: dict[str, list[int]] = defaultdict(list)
        for path in sorted(folder.glob(f"{table}-[0-9]*.parquet")):
            rows = shards.read_file(path, ["image_id", "completion"]).to_pydict()
            texts = [reasoning(text) for text in rows["completion"]]
            if file.is_file():
                coded = tokenizer.encode_batch(texts, add_special_tokens=False)
                counts = [len(each.ids) for each in coded]
            else:
                counts = [len(text.split()) for text in texts]
            for image, count in zip(rows["image_id"], counts, strict=True):
                by_image[image].append(count)
        return by_image

    sampled, taken = lengths("rollouts"), {}
    if "adaptive" in modes:
        counted = shards.read_file(folder / "adaptive_counts.parquet").to_pylist()
        taken = {row["image_id"]: row["num_rollouts"] for row in counted}
    means = {}
    for mode in modes:
        asked = sampled if mode == "majority" else {} if mode == "constrained" else lengths(mode)
        answers = [count for counts in asked.values() for count in counts]
        total = sum(answers)
        if mode not in ("one_step", "majority"):
            first = taken if mode == "adaptive" else {}
            total += sum(sum(counts[: first.get(image)]) for image, counts in sampled.items())
        mean = sum(answers) / len(answers) if answers else 0.0
        means[mode] = {"answer": mean, "image": total / max(1, len(images))}
    return {"unit": "tokens" if file.is_file() else "words", "modes": means}


def mean_thoughts(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What `thoughts` found for each row, as means over seeds, from their `evaluate` folders.

    Without the modes that some seeds lack, and without rows of which an evaluation has nothing, as an
    earlier version's, or whose units differ.
    """
    by_row: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        path = Path(run["evaluate"]) / "stats.json"
        stats = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        by_row[row_name(run)].append(stats.get("thoughts") or {})
    means = {}
    for name, seeds in by_row.items():
        units = {each.get("unit") for each in seeds}
        if len(units) > 1 or None in units:
            continue
        shared = [mode for mode in seeds[0]["modes"] if all(mode in s["modes"] for s in seeds)]
        means[name] = {
            "unit": units.pop(),
            "modes": {
                mode: {
                    key: sum(each["modes"][mode][key] for each in seeds) / len(seeds)
                    for key in ("answer", "image")
                }
                for mode in shared
            },
        }
    return means


def _spent(run: Mapping[str, Any]) -> dict[str, int]:
    trains = [manifest.read(Path(path)) for path in run["train"]]
    proposes = [manifest.read(Path(path)) for path in run["propose"]]
    builds = [manifest.read(Path(path)) for path in run["build_mcq"]]
    steps = [_rows(train, "train_log") for train in trains]
    questions = [
        _generated(count, train) * int(train.settings.get("questions_per_step", 0))
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


def _generated(steps: int, train: Manifest) -> int:
    """In how many of the steps completions were generated: the others use the last ones again."""
    return math.ceil(steps / int((train.settings.get("trl") or {}).get("num_iterations", 1)))


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
