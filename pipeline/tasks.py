"""The whole line: every task is parameters, what it needs, and one call of a function in `tasks`.

    data card -> Download -> Split -+--------------------------------------------------+
                                    |   round 0             round 1 (refresh)          |
    BasePolicy ---------------------+-> Propose -> BuildMCQ -> Train -+                |
                                    |                                 +-> Propose -> BuildMCQ -> Train
                                    +-> Evaluate (any policy) -> Report     TrainDiVE = all of it

    stages/data.py        Download, Split, BasePolicy
    stages/rounds.py      Propose, BuildMCQ, Train
    stages/evaluation.py  Evaluate, Judge
    stages/report.py      Report, TrainDiVE
    stages/compare.py     Compare: methods and seeds in one table
    stages/engine.py      how text is generated
    methods.py            what a method changes

    luigi --module pipeline.tasks TrainDiVE
    luigi --module pipeline.tasks BuildMCQ --refresh-round 1
    luigi --module pipeline.tasks TrainDiVE --dataset cub+flowers

Settings come from luigi.cfg, one section per task. `refresh_round` r > 0 proposes with the policy
that round r - 1 trained, so the graph is static and every round's shards stay on disk. Of a mix of
sets each has its own images, questions and evaluation; BasePolicy and Train belong to the mix.
"""

from pipeline.methods import NAMES as METHODS
from pipeline.settings import run
from pipeline.stage import lineage
from pipeline.stages.compare import Compare
from pipeline.stages.data import BasePolicy, Download, Split, data, paths, snake
from pipeline.stages.engine import engine
from pipeline.stages.evaluation import Evaluate, Judge, cross_evaluations, judgements
from pipeline.stages.report import Report, TrainDiVE
from pipeline.stages.rounds import BuildMCQ, Propose, Train, graph, last_round

__all__ = [
    "METHODS",
    "BasePolicy",
    "BuildMCQ",
    "Compare",
    "Download",
    "Evaluate",
    "Judge",
    "Propose",
    "Report",
    "Split",
    "Train",
    "TrainDiVE",
    "cross_evaluations",
    "data",
    "engine",
    "graph",
    "judgements",
    "last_round",
    "lineage",
    "paths",
    "run",
    "snake",
]
