"""How time and memory grow with the rows: the stages without a model, `verify` and `status`.

    python -m tests.bench.growth --max-rows 100000
    python -m tests.bench.growth --max-rows 1000000 --max-pictures 100000 --figure docs/growth.svg

From 1,000 rows on, half a decade at a time. A row is a picture of 64 x 48 pixels for Download, an image
for Split, a rollout for BuildMCQ (20 an image), a prediction for Report (of two policies in two modes),
and for `verify` and `status` a rollout in shards of 100 rows: Propose's artifact, which is done, and a
working folder of BuildMCQ with as many shards. All are written by the project's own writers.

Time is processor time in seconds, the least of the repeats. The exponent is the slope of its logarithm
over that of the rows, with its standard error. Both are counted from the same command on 500 rows, so
that the start of a process does not pass for flat growth, and points within 0.2 s of it are
left out. Memory is the process' own peak, start included.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import linregress

from tests.bench import results, synthetic
from tests.conftest import ROOT, settings_of

STAGES = ("Download", "Split", "BuildMCQ", "Report", "verify", "verify --quick", "status")
ROLLOUTS, SHARD_ROWS, START, LEAST = 20, 100, 500, 0.2
# Runs a module as a command, and notes its processor time, its children's too, and its own peak.
NOTED = """
import atexit, json, os, resource, runpy, sys
def note():
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    with open(os.environ["NOTE"], "w") as file:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        json.dump([sum(each.ru_utime + each.ru_stime for each in used), peak], file)
atexit.register(note)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
Point = tuple[int, float, float]  # rows, processor seconds, peak MB


def main() -> None:
    """Measure every stage at every size; print a table, write the figures and the drawing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-rows", type=int, default=100_000)
    parser.add_argument(
        "--max-pictures", type=int, default=100_000, help="rows of Download at most"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; some GB a million rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the curves as SVG here")
    parser.add_argument("--artifacts", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.artifacts:
        return write_artifacts(given.artifacts)
    halves = range(6, 1 + round(2 * math.log10(given.max_rows)))
    sizes = [START, *(round(10 ** (half / 2)) for half in halves)]
    curves: dict[str, list[Point]] = {stage: [] for stage in given.stages}
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            for stage, commands in prepared(Path(name), rows, given).items():
                curves[stage].append((rows, *measure(Path(name), commands, given.repeats)))
                print(stage, *curves[stage][-1], file=sys.stderr)
    print(
        f"{'':15} {'rows':>9} {'seconds':>8} {'exponent':>14} {'MB':>6} {'exponent':>14} {'bytes a row':>12}"
    )
    figures = []
    for stage, points in curves.items():
        seconds, memory = exponent(above_start(points)), exponent([p[::2] for p in points[1:]])
        (before, _, small), (rows, took, peak) = points[-2:]
        each = (peak - small) * 2**20 / (rows - before)
        print(
            f"{stage:15} {rows:9,} {took:8.2f} {_text(seconds):>14} {peak:6.0f} {_text(memory):>14} {each:12.0f}"
        )
        for what, value, unit in (
            ("exponent of time", seconds, "slope, standard error"),
            ("exponent of memory", memory, "slope, standard error"),
            ("rows, processor seconds, MB", points, ""),
        ):
            figures.append(
                {"figure": f"{stage}: {what}", "value": value, "goal": None, "unit": unit}
            )
    results.write(given.json, figures, vars(given))
    if given.figure:
        given.figure.write_text(drawing(curves), encoding="utf-8")


def above_start(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Rows and seconds above those of the start, where these are more than LEAST."""
    few, start = points[0][0], min(took for _, took, _ in points)  # no run is quicker than a start
    return [(rows - few, took - start) for rows, took, _ in points[1:] if took - start > LEAST]


def exponent(points: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The slope in logarithms and its standard error; None for fewer than three points."""
    if len(points) < 3:
        return None
    fit = linregress(*([math.log(point[axis]) for point in points] for axis in (0, 1)))
    return float(fit.slope), float(fit.stderr)


def measure(folder: Path, commands: list[list[str]], repeats: int) -> tuple[float, float]:
    """The least processor seconds, and the highest peak in MB, of a command; others run before it."""
    note = folder / "note.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOTE": str(note), "OMP_NUM_THREADS": "1"}
    noted = []
    for _ in range(repeats):
        for output in (folder / "out").glob("*"):
            shutil.rmtree(output)
        for words in commands:
            ran = subprocess.run([sys.executable, "-c", NOTED, *words], cwd=folder, env=environment,
                                 capture_output=True, text=True)  # fmt: skip
            if ran.returncode:
                sys.exit(f"{' '.join(words)}: {ran.stderr[-2000:]}{ran.stdout[-2000:]}")
        noted.append(json.loads(note.read_text()))
    return min(seconds for seconds, _ in noted), max(peak for _, peak in noted)


def prepared(folder: Path, rows: int, given: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Write each stage's inputs of `rows` rows below `folder`; returns its commands by stage."""
    (folder / "out").mkdir()
    synthetic.write_card(folder, "photos")
    makers: dict[str, Callable[[Path, int], list[str]]] = {
        "Download": _download, "Split": _split, "BuildMCQ": _build_mcq, "Report": _report,
    }  # fmt: skip
    commands = {
        stage: [maker(folder, rows)]
        for stage, maker in makers.items()
        if stage in given.stages and (stage != "Download" or rows <= given.max_pictures)
    }
    looking = [stage for stage in given.stages if stage not in makers]
    if looking:
        config = (ROOT / "luigi.cfg").read_text().replace("dataset = beetles", "dataset = bench")
        (folder / "luigi.cfg").write_text(config)
        writing = [sys.executable, "-m", "tests.bench.growth", "--artifacts", str(rows)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(writing, cwd=folder, env=environment, check=True)
    return commands | {stage: [["pipeline", *stage.split()]] for stage in looking}


def _recipe(folder: Path, module: str, **arguments: Any) -> list[str]:
    """The words of a stage's command; its input folders lie in `folder`."""
    output = folder / "out" / module
    config = folder / f"{module}.json"
    config.write_text(json.dumps({"output": str(output), "card": "bench", **arguments}))
    return [f"tasks.{module}", str(config)]


def _download(folder: Path, rows: int) -> list[str]:
    from tasks.ingest.settings import DownloadSettings

    synthetic.write_photographs(folder / "photos", rows)
    return _recipe(folder, "download", **settings_of(DownloadSettings).values())


def _split(folder: Path, rows: int) -> list[str]:
    from tasks.ingest.settings import SplitSettings

    synthetic.write_images(folder / "many", synthetic.rows_of(rows, 200))
    settings = settings_of(
        SplitSettings, protocol="all", test_share=0.5, val_share=0.0, pretrain_share=0.0
    ).values()
    return _recipe(folder, "split", download="many", seed=0, **settings)


def _build_mcq(folder: Path, rows: int) -> list[str]:
    from tasks.questions.settings import BuildMCQSettings

    images = synthetic.rows_of(rows // ROLLOUTS)
    synthetic.write_images(folder / "images", images)
    synthetic.write_split(folder / "split", images)
    synthetic.write_rollouts(folder / "rollouts", len(images), ROLLOUTS)
    places = {"download": "images", "split": "split", "propose": "rollouts"}
    settings = settings_of(BuildMCQSettings, max_unparsed_per_image=1.0).values()
    return _recipe(folder, "build_mcq", **places, prompt_style="brief", seed=0, **settings)


def _report(folder: Path, rows: int) -> list[str]:
    images = synthetic.rows_of(rows // 4, 200)
    synthetic.write_images(folder / "tested", images)
    synthetic.write_split(folder / "test_split", images, "test")
    for number, policy in enumerate(("zero_shot", "dive_k")):
        synthetic.write_predictions(folder / policy, images, ("one_step", "majority"), number)
    evaluations = [{"name": name, "path": name} for name in ("zero_shot", "dive_k")]
    places = {"download": "tested", "split": "test_split"}
    return _recipe(folder, "report", evaluations=evaluations, rounds=[], manifests=[], **places)


def write_artifacts(rows: int) -> None:
    """Commit Download, Split and Propose of the run in this folder; leave BuildMCQ unfinished."""
    from pipeline import tasks
    from pipeline.artifacts import source_code, store

    images = synthetic.rows_of(rows // ROLLOUTS)
    built = tasks.BuildMCQ(dataset="bench")
    propose = built.needed["propose"]
    split = propose.needed["split"]
    for stage in (split.needed["download"], split, propose):
        partial = store.partial_of(stage.folder)
        if stage is split:
            synthetic.write_split(partial, images)
        elif stage is propose:
            per_shard = SHARD_ROWS // ROLLOUTS
            synthetic.write_rollouts(partial, len(images), ROLLOUTS, per_shard)
        else:
            synthetic.write_images(partial, images)
        facts = {"fingerprint": stage.fingerprint, "sources": source_code.digests(stage.module)}
        store.commit(partial, stage.folder, {**stage.identity, **facts, "seconds": 1.0})
    partial = store.partial_of(built.folder)
    partial.mkdir(parents=True)
    for shard in propose.folder.glob("rollouts-*.parquet"):
        os.link(shard, partial / shard.name.replace("rollouts", "mcq"))


def drawing(curves: dict[str, list[Point]]) -> str:
    """Time above, memory below; the stages on the left, the commands on the right."""
    from tasks.pages.charts import Series, line_chart
    from tasks.pages.figures import Figure, standalone

    kinds = [[s for s in curves if s[0].isupper()], [s for s in curves if s[0].islower()]]
    parts = []
    for row, (what, axis) in enumerate((("processor seconds", 1), ("MB at most", 2))):
        for column, names in enumerate(kinds):
            lines = [
                Series(
                    name, [(math.log10(p[0]), math.log10(p[axis])) for p in curves[name][1:]], style
                )
                for style, name in enumerate(names)
            ]
            title = f"{('Stages', 'Commands')[column]}: {what}"
            decades = int(max(line.points[-1][0] for line in lines))
            chart = line_chart(
                f"growth{row}{column}",
                title,
                "",
                lines,
                x_label="rows, power of ten",
                x_ticks=range(3, decades + 1),
                y_range=((-1, 3), (1, 4))[row],
            )
            legend = [(line.name, line.style) for line in lines]
            drawn = Figure(f"{row}{column}", title, "As powers of ten.", chart, (), (), legend)
            own = str(standalone(drawn)).replace(
                "<svg ", f'<svg x="{column * 370}" y="{row * 310}" ', 1
            )
            parts.append(own)
    inner = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 620" width="720">{inner}</svg>\n'
    )


def _text(fit: tuple[float, float] | None) -> str:
    return "start alone" if fit is None else f"{fit[0]:.2f} +- {fit[1]:.2f}"


if __name__ == "__main__":
    main()
