"""Compare: compares methods and seeds, trained at equal budgets, on the same test images.

    luigi --module pipeline.tasks Compare
    luigi --module pipeline.tasks Compare --dataset cub --methods '["dive_k", "virft"]'

Each method and seed is the same chain of stages as in TrainDiVE, so artifacts of earlier runs are
used again. All methods of a seed share the proposals of round 0.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import luigi

from pipeline.stage import Stage, lineage
from pipeline.stages.data import Download, snake
from pipeline.stages.evaluation import Evaluate
from pipeline.stages.rounds import last_round
from tasks.runtime.protocol import METHOD_NAMES, ZERO_SHOT
from tasks.runtime.settings import nearest, plain


class Compare(Stage):
    """Tables of methods and seeds on the same test images, with the budget that each of them spent."""

    methods = luigi.ListParameter(description="methods, beside the base policy, which is always in")
    seeds = luigi.ListParameter(description="training seeds; each has proposals of its own")
    datasets = luigi.ListParameter(
        description="data cards, or mixes joined by +; empty: the dataset of [run]"
    )
    by_rounds = luigi.ListParameter(
        description="methods of which the policy of every round is evaluated, not only the last"
    )

    module = "tasks.compare"

    def needs(self) -> dict[str, Stage]:
        needed: dict[str, Stage] = {}
        for policy, evaluate in self.runs():
            needed["/".join(str(value) for value in policy.values())] = evaluate
            needed[f"split/{policy['set']}/{policy['seed']}"] = evaluate.needs()["split"]
        return needed

    def runs(self) -> Iterator[tuple[dict[str, Any], Stage]]:
        """Every policy of the table, as (its description, its evaluation)."""
        self._check()
        for dataset in plain(self.datasets) or [self.dataset]:
            sets = sets_of(dataset)
            trained_on = "+".join(name for name, _ in sets)
            for seed in plain(self.seeds):
                for method, round_ in self._rows():
                    last = last_round(method) if method != ZERO_SHOT else 0
                    for name, subset in sets:
                        policy = {"set": name, "trained_on": trained_on, "method": method}
                        of_run = {"dataset": dataset, "subset": subset, "seed": seed}
                        refresh_round = last if round_ is None else round_
                        evaluate = Evaluate(method=method, refresh_round=refresh_round, **of_run)
                        yield {**policy, "round": round_, "seed": seed}, evaluate

    def place(self):
        return "compare"

    @property
    def of_a_set(self) -> bool:
        """Whether it compares on one dataset. A comparison on several lies beside their folders."""
        return len(plain(self.datasets)) < 2

    @cached_property
    def names(self) -> list[str]:
        """The cards of the first dataset of `datasets`, else of the dataset of [run]."""
        return Download(dataset=(plain(self.datasets) or [self.dataset])[0]).names

    def arguments(self):
        runs = []
        for policy, evaluate in self.runs():
            below = lineage(evaluate)
            folders = {
                snake(family): [str(s.folder) for s in below if s.task_family == family]
                for family in ("Propose", "BuildMCQ", "Train")
            }
            split = evaluate.needs()["split"]
            own = {"evaluate": str(evaluate.folder), "split": str(split.folder)}
            runs.append({**policy, **own, **folders})
        return {"runs": runs}

    def run(self) -> None:
        from tasks.pages.compare_tables import summary

        super().run()
        contents = json.loads((self.folder / "compare.json").read_text(encoding="utf-8"))
        print(f"{summary(contents)}\n\ncomparison {self.folder}/index.html", flush=True)

    def _rows(self) -> list[tuple[str, int | None]]:
        """(method, round) of each row of the table, in order; None stands for the last round."""
        rows: list[tuple[str, int | None]] = [(ZERO_SHOT, None)]
        for method in plain(self.methods):
            if method == ZERO_SHOT:
                continue
            if method in plain(self.by_rounds):
                rows += [(method, number) for number in range(last_round(method))]
            rows.append((method, None))
        return rows

    def _check(self) -> None:
        for key in ("methods", "by_rounds"):
            if unknown := sorted(set(plain(getattr(self, key))) - set(METHOD_NAMES)):
                near = nearest(unknown[0], METHOD_NAMES)
                raise self.refusal(f"[Compare] {key}: unknown method {unknown[0]!r}{near}")
        if extra := sorted(set(plain(self.by_rounds)) - set(plain(self.methods))):
            raise self.refusal(f"[Compare] by_rounds: {extra[0]!r} is not in methods")
        if not plain(self.seeds):
            raise self.refusal("[Compare] seeds is empty; give at least one")


def sets_of(dataset: str) -> list[tuple[str, str]]:
    """For each set of a dataset: its card's name, and the `subset` of the stages that work on it."""
    names = Download(dataset=dataset).names
    return [(name, name if len(names) > 1 else "") for name in names]
