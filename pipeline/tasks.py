"""All Luigi tasks of the pipeline. Each has parameters, inputs, and one function in `tasks` to call.

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

Settings come from luigi.cfg, one section per task. In round `refresh_round` r > 0, Propose uses the
policy that round r - 1 trained. So the graph is static, and the shards of every round stay on disk.
In a mix of sets, each set has its own images, questions and evaluation, and all sets share
BasePolicy and Train.
"""

from pipeline.settings import run
from pipeline.stage import lineage
from pipeline.stages.compare import Compare
from pipeline.stages.data import BasePolicy, Download, Split, data, paths, snake
from pipeline.stages.engine import engine
from pipeline.stages.evaluation import Evaluate, Judge, cross_evaluations, judgements
from pipeline.stages.report import Report, TrainDiVE
from pipeline.stages.rounds import BuildMCQ, Propose, Train, graph, last_round

__all__ = [
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
