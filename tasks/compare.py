"""Compare: compares methods and seeds on the same test images, in tables and on a page.

    python -m tasks.compare recipe.json

Everything is computed from artifacts. The denominator of every figure is the set of test images, the
same for every method. Differences are paired image by image, from the base policy and between
methods, with p values adjusted over the datasets (Holm). Each method's budget (rollouts, optimiser
steps, completions, questions) stands beside its accuracy, and unequal budgets are pointed out. Where
one of the paper's five sets is compared, its published figures stand beside ours.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from datasets import Features

import data_cards
from tasks.evaluation import comparison, published
from tasks.evaluation.budget_curve import budget_curve, mean_curve
from tasks.evaluation.comparison import Figure
from tasks.evaluation.cost import budgets, mean_thoughts, row_name, unequal
from tasks.evaluation.metrics import holm
from tasks.evaluation.near_misses import mean_near_misses, near_misses
from tasks.pages.compare_latex import latex
from tasks.pages.compare_page import compare_page
from tasks.pages.compare_sections import row_label
from tasks.pages.compare_tables import csv_table, markdown
from tasks.pages.text import in_order, mark, warning
from tasks.questions.trained_on import seen
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.protocol import ZERO_SHOT
from tasks.tables import shards, split_table
from tasks.tables.schemas import GROUPS

SEED = 0  # of the bootstrap: the same artifacts give the same tables

# Row -> mode -> group -> for each seed: image id -> right or wrong.
Outcomes = dict[str, dict[str, dict[str, list[dict[str, bool]]]]]


class CompareError(StageError):
    """Evaluations that must not be compared; the message names the folder and the reason."""


def compare(output: Path, *, runs: list[dict[str, Any]]) -> None:
    """Write `compare.json`, `.csv`, `.md`, `.tex` and `index.html`.

    Each run is one evaluated policy, with the keys `set`, `trained_on`, `method`, `round` (null for
    the last round), `seed`, the artifact folders `evaluate` and `split`, and the lists of all folders
    of `propose`, `build_mcq` and `train` that it depends on. Raises CompareError when policies were
    evaluated on different images, or when a method lacks a seed.
    """
    contents = tabulate(runs)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "compare.json": json.dumps(contents, indent=1, allow_nan=False) + "\n",
        "compare.csv": csv_table(contents),
        "compare.md": markdown(contents),
        "compare.tex": latex(contents),
        "index.html": compare_page(contents),
    }
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")


def tabulate(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of `compare.json`: all figures of the tables as JSON values."""
    if not runs:
        raise CompareError("there is nothing to compare: [Compare] methods is empty")
    runs, warnings = _marked(runs)
    rows = {row_name(run): run for run in runs}
    names = sorted(rows, key=lambda name: name != ZERO_SHOT)  # the baseline first, else unchanged
    sets = list(dict.fromkeys((run["set"], run["trained_on"]) for run in runs))
    tables, all_figures = [], []
    for name, trained_on in sets:
        own_runs = [run for run in runs if (run["set"], run["trained_on"]) == (name, trained_on)]
        table, figures = _of_set(own_runs, names)
        tables.append({"set": name, "trained_on": trained_on, **table, **_from_rollouts(own_runs)})
        all_figures.append(figures)
    _compare_rows(tables, all_figures, names)
    contents: dict[str, Any] = {
        "rows": [
            {"name": name, "method": rows[name]["method"], "round": rows[name]["round"]}
            for name in names
        ],
        "seeds": sorted({run["seed"] for run in runs}),
        "modes": in_order(mode for table in tables for mode in table["modes"]),
        "sets": tables,
        "over_datasets": _over_datasets(all_figures, names) if len(sets) > 1 else {},
        "budgets": budgets(runs),
        "warnings": warnings,
    }
    contents["published"] = published.figures_for(tables)
    contents["unequal"] = unequal(contents, ZERO_SHOT)
    return contents


def _marked(runs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs, each with the `mark` of its row, and a warning for each row that has one.

    A row has a mark where any of its policies saw test images, or images of novel classes, in training.
    """
    saw: dict[str, Counter[str]] = defaultdict(Counter)
    for run in runs:
        saw[row_name(run)] |= seen(
            [*run["build_mcq"], *run["train"]], run["evaluate"], run["split"]
        )
    named = [{**run, "mark": mark(saw[row_name(run)])} for run in runs]
    return named, [
        told for name, counts in saw.items() if (told := warning(counts, row_label(name)))
    ]


def _of_set(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, dict[str, Any]]]]:
    """One set's table as JSON values, and its figures by mode and row with their outcomes."""
    seeds = sorted({run["seed"] for run in runs})
    outcomes, ids = _outcomes(runs, names, seeds)
    order = {group: sorted(set().union(*by_seed)) for group, by_seed in ids.items()}
    draws = {
        group: comparison.draw_images(len(images), seed=SEED + index)
        for index, (group, images) in enumerate(order.items())
    }
    figures: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    shown: dict[str, Any] = {}
    for mode in in_order(mode for by_mode in outcomes.values() for mode in by_mode):
        for name in names:
            if mode not in outcomes[name]:
                continue
            values = {
                group: comparison.align(outcomes[name][mode][group], order[group])
                for group in order
            }
            by_group = comparison.figures(values, draws)
            figures[mode][name] = {"figures": by_group, "outcomes": values}
            shown.setdefault(mode, {})[name] = {key: f.values() for key, f in by_group.items()}
    counts = {group: len(images) for group, images in order.items()}
    same = all(len({frozenset(seed) for seed in by_seed}) == 1 for by_seed in ids.values())
    table = {"seeds": seeds, "images": counts, "parts": _parts(runs, order)}
    return table | {"same_images_for_all_seeds": same, "modes": shown}, figures


def _outcomes(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str], seeds: Sequence[int]
) -> tuple[Outcomes, dict[str, list[set[str]]]]:
    """The outcomes of all runs on one set, and each seed's image ids by group."""
    by_row = {(row_name(run), run["seed"]): run for run in runs}
    group_of = {run["seed"]: split_table.groups(Path(run["split"])) for run in runs}
    ids: dict[str, list[set[str]]] = {}
    outcomes: Outcomes = {name: {} for name in names}
    for number, seed in enumerate(seeds):
        wanted: set[str] | None = None
        for name in names:
            if (run := by_row.get((name, seed))) is None:
                raise CompareError(
                    f"{name} was not evaluated on {runs[0]['set']} with seed {seed}; every method "
                    "needs every seed"
                )
            answers = _answers(Path(run["evaluate"]))
            for mode, right in answers.items():
                wanted = set(right) if wanted is None else wanted
                if odd := sorted(wanted ^ set(right)):
                    raise CompareError(
                        f"policies must be compared on the same images, but {run['evaluate']} "
                        f"({name}, {mode}) differs in {len(odd)} from the others, such as {odd[0]!r}"
                    )
                if unknown := sorted(set(right) - set(group_of[seed])):
                    raise CompareError(f"{run['evaluate']} evaluates {unknown[0]!r}, no such image")
                for group in GROUPS:
                    own = {i: value for i, value in right.items() if group_of[seed][i] == group}
                    if own:
                        by_group = outcomes[name].setdefault(mode, {})
                        by_group.setdefault(group, []).append(own)
        for group in GROUPS:
            if own_ids := {i for i in wanted or () if group_of[seed][i] == group}:
                ids.setdefault(group, []).append(own_ids)
        for name in names:  # drop a mode that only some seeds have: it has no mean over seeds
            outcomes[name] = {
                mode: parts
                for mode, parts in outcomes[name].items()
                if all(len(part) == number + 1 for part in parts.values())
            }
    return outcomes, ids


def _from_rollouts(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lengths of thoughts by row and, with a card of these classes, near misses and budget curves."""
    curves: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    near: dict[str, list[dict[str, Any]]] = defaultdict(list)
    nothing: dict[str, Any] = {"near_misses": {}, "budget_curves": {}}
    nothing["thoughts"] = mean_thoughts(runs)
    if not data_cards.exists(runs[0]["set"]):
        return nothing
    card = data_cards.load(runs[0]["set"])
    for run in runs:
        table = shards.read(Path(run["evaluate"]), "predictions")
        if tuple(Features.from_arrow_schema(table.schema)["label"].names) != card.classes:
            return nothing
        groups = split_table.groups(Path(run["split"]))
        rows = [{**row, "group": groups[row["image_id"]]} for row in table.to_pylist()]
        near[row_name(run)].append(near_misses(rows, card))
        curves[row_name(run)].append(budget_curve(Path(run["evaluate"]), rows, card))
    return nothing | {
        "near_misses": {n: mean for n, seeds in near.items() if (mean := mean_near_misses(seeds))},
        "budget_curves": {n: curve for n, seeds in curves.items() if (curve := mean_curve(seeds))},
    }


def _answers(folder: Path) -> dict[str, dict[str, bool]]:
    """Mode -> image id -> right or wrong."""
    right: dict[str, dict[str, bool]] = defaultdict(dict)
    for row in shards.read(folder, "predictions", ["image_id", "mode", "correct"]).to_pylist():
        right[row["mode"]][row["image_id"]] = bool(row["correct"])
    if not right:
        raise CompareError(f"{folder} holds no predictions; run its Evaluate again")
    return dict(right)


def _parts(runs: Sequence[Mapping[str, Any]], images: Mapping[str, list[str]]) -> dict[str, str]:
    """Group -> the parts of the splits that its evaluated images are of, such as test."""
    rows = [
        row
        for folder in {run["split"] for run in runs}
        for row in shards.read(Path(folder), "split", ["image_id", "split"]).to_pylist()
    ]
    evaluated = {group: set(ids) for group, ids in images.items()}
    return {
        group: " or ".join(sorted({row["split"] for row in rows if row["image_id"] in ids}))
        for group, ids in evaluated.items()
    }


def _compare_rows(
    tables: list[dict[str, Any]], all_figures: list[dict[str, Any]], names: Sequence[str]
) -> None:
    """Add the paired differences of every two rows to `tables`, with p adjusted over the sets (Holm)."""
    for first, second in combinations(names, 2):
        families: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for table, figures in zip(tables, all_figures, strict=True):
            for mode, by_row in figures.items():
                if first not in by_row or second not in by_row:
                    continue
                for key in by_row[first]["figures"]:
                    entry = _difference(by_row[first], by_row[second], key)
                    families[mode, key].append(entry)
                    named = {"from": first, "to": second, "key": key, **entry}
                    table.setdefault("pairs", {}).setdefault(mode, []).append(named)
                    entry["named"] = named
                    if first == ZERO_SHOT:
                        table["modes"][mode][second][key]["difference"] = entry
        for family in families.values():
            adjusted = holm([entry["p"] for entry in family])
            for entry, value in zip(family, adjusted.tolist(), strict=True):
                entry.pop("named")["p_holm"] = value
                entry["p_holm"] = value


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> dict[str, Any]:
    one, two = before["figures"][key], after["figures"][key]
    change = Figure(two.by_seed - one.by_seed, two.drawn - one.drawn)
    if key in before["outcomes"]:
        p = comparison.sign_flip(before["outcomes"][key], after["outcomes"][key])
    else:
        p = comparison.bootstrap_p(change.drawn)
    return {**change.values(), "p": p}


def _over_datasets(all_figures: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means over the sets, by mode and row, and their differences from the base policy."""
    means: dict[str, Any] = {}
    for mode in in_order(mode for figures in all_figures for mode in figures):
        summaries = {}
        for name in names:
            parts = [figures.get(mode, {}).get(name) for figures in all_figures]
            if all(parts):
                summaries[name] = comparison.over_datasets([part["figures"] for part in parts])
        means[mode] = {
            name: {key: figure.values() for key, figure in summary.items()}
            for name, summary in summaries.items()
        }
        for name, summary in summaries.items():
            if name == ZERO_SHOT or ZERO_SHOT not in summaries:
                continue
            for key, figure in summary.items():
                base = summaries[ZERO_SHOT][key]
                change = Figure(figure.by_seed - base.by_seed, figure.drawn - base.drawn)
                p = comparison.bootstrap_p(change.drawn)
                means[mode][name][key]["difference"] = {**change.values(), "p": p}
    return means


if __name__ == "__main__":
    main(compare, short=True)
