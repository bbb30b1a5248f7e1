"""The last stages: Report, one page a set, and TrainDiVE, which requires the whole pipeline."""

import json

import luigi

from pipeline.methods import METHOD_HELP, SEED_HELP, method_of
from pipeline.settings import Checked
from pipeline.stage import OfSet, Stage, lineage
from pipeline.stages.data import data
from pipeline.stages.evaluation import Evaluate, cross_evaluations, judgements
from pipeline.stages.rounds import BuildMCQ, Propose, Train, last_round
from tasks.runtime.protocol import ZERO_SHOT


class Report(OfSet):
    """Writes metrics with intervals, a page, and figures."""

    method = luigi.Parameter(description=METHOD_HELP)
    seed = luigi.IntParameter(description=SEED_HELP)

    module = "tasks.report"
    code_version = 3

    def needs(self):
        of_run = {"dataset": self.dataset, "seed": self.seed}
        of_set = {"subset": self.subset, **of_run}
        needed: dict[str, Stage] = {
            ZERO_SHOT: Evaluate(method=ZERO_SHOT, refresh_round=0, **of_set)
        }
        if self.method != ZERO_SHOT:
            chain = {"method": self.method, **of_set}
            needed[self.method] = Evaluate(refresh_round=last_round(self.method), **chain)
            for r in range(last_round(self.method) + 1):
                needed[f"train{r}"] = Train(refresh_round=r, method=self.method, **of_run)
                needed[f"mcq{r}"] = BuildMCQ(refresh_round=r, **chain)
                if method_of(self.method).questions == "mcq":
                    needed[f"propose{r}"] = Propose(refresh_round=r, **chain)
        for name, by_method in cross_evaluations(self).items():
            needed |= {f"cross/{name}/{method}": stage for method, stage in by_method.items()}
        needed |= {f"judge/{method}": stage for method, stage in judgements(self).items()}
        return {**needed, **data(self, self.set_name)}

    def place(self):
        return "/".join(filter(None, (self.method, "report", self.subset)))

    def arguments(self):
        need = self.needs()
        names = [ZERO_SHOT] if self.method == ZERO_SHOT else [ZERO_SHOT, self.method]
        rounds = range(last_round(self.method) + 1) if self.method != ZERO_SHOT else ()
        return {
            "card": self.set_name,
            "evaluations": [{"name": name, "path": str(need[name].folder)} for name in names],
            "rounds": [
                {
                    "round": r,
                    "propose": str(need[f"propose{r}"].folder) if f"propose{r}" in need else "",
                    "build_mcq": str(need[f"mcq{r}"].folder),
                    "train": str(need[f"train{r}"].folder),
                }
                for r in rounds
            ],
            "download": str(need["download"].folder),
            "split": str(need["split"].folder),
            "manifests": [str(stage.folder / "manifest.json") for stage in lineage(self)],
            "cross": [
                {
                    "trained_on": self.dataset,
                    "set": key.split("/")[1],
                    "method": key.split("/")[2],
                    "path": str(stage.folder),
                }
                for key, stage in need.items()
                if key.startswith("cross/")
            ],
            "judged": [
                {"name": key.split("/")[1], "path": str(stage.folder)}
                for key, stage in need.items()
                if key.startswith("judge/")
            ],
            "command": f"luigi --module pipeline.tasks TrainDiVE --dataset {self.dataset} "
            f"--method {self.method} --seed {self.seed}",
        }


class TrainDiVE(Checked, luigi.Task):
    """Runs the whole pipeline: all rounds, the evaluations, and one report a set."""

    dataset = luigi.Parameter(description="a data card's name, or several joined by +")
    method = luigi.Parameter(description=METHOD_HELP)
    seed = luigi.IntParameter(description=SEED_HELP)

    def requires(self):
        report = Report(dataset=self.dataset, subset="", method=self.method, seed=self.seed)
        return report.parts() or [report]

    def complete(self):
        return all(report.complete() for report in self.requires())

    def run(self):
        from tasks.pages.text import summary

        metrics = [report.folder / "metrics.json" for report in self.requires()]
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in metrics]
        print("\n\n".join(map(summary, contents)), flush=True)
