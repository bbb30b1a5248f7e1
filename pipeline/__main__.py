"""Look at what runs left behind, check it, and tidy up.

python -m pipeline status             every stage: done, partial, stale and why; what a run would do
python -m pipeline plan               images, rollouts, tokens, steps, hours and memory of a run to come
python -m pipeline where              the last report's figures, and where everything lies
python -m pipeline inspect build_mcq  counts and sample rows of a stage's current artifact; for
                                      build_mcq also a page of questions, to filter and to look at
python -m pipeline verify             every checksum, row count and reference between artifacts
python -m pipeline diff A B           two artifacts of a stage: settings, counts, files that differ
python -m pipeline invalidate propose delete a stage's current artifact, so that it is made again
python -m pipeline gc                 what nothing current refers to; --delete to delete it
python -m pipeline predict PHOTO...   what a policy says is on images

Exit codes: 0; 1 for an error, with verify for damage, with predict for an image that could not be
read; 2 for a wrong command line.
"""

import argparse
import difflib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tasks import predict_command


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, example: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, epilog=f"example: python -m pipeline {example or name}"
        )
        added.add_argument("--dataset", help="a data card's name; default: that of luigi.cfg")
        added.add_argument(
            "--recipe", metavar="FILES", help="read over luigi.cfg, separated by commas"
        )
        return added

    command("where", "the last report's figures and the folders")
    status = command("status", "every stage and what a run would do", "status --method dive_k")
    status.add_argument("--method", help="default: that of luigi.cfg")
    status.add_argument("--seed", type=int, help="default: that of luigi.cfg")
    plan = command("plan", "what a run will take", "plan --recipe training/recipes/paper_7b.cfg")
    plan.add_argument("--method", help="default: that of luigi.cfg")
    plan.add_argument("--seed", type=int, help="default: that of luigi.cfg")
    plan.add_argument(
        "--tokens-per-second",
        type=float,
        default=0,
        help="written by the engine, all GPUs together",
    )
    plan.add_argument(
        "--update-tokens-per-second",
        type=float,
        default=0,
        help="of gradient steps, read and written",
    )
    plan.add_argument(
        "--answer-tokens", type=int, default=0, help="default: a quarter of the limit"
    )
    plan.add_argument("--chars-per-token", type=float, default=4.0, help="without a tokenizer")
    plan.add_argument("--tokenizer", default="", help="a folder with one")
    inspect = command("inspect", "counts and sample rows", "inspect build_mcq")
    inspect.add_argument("stage", help="a stage's folder name, or a path to an artifact")
    inspect.add_argument("--rows", type=int, default=3, help="sample rows a table")
    inspect.add_argument("--questions", type=int, default=300, help="questions on the page")
    inspect.add_argument("--page", type=Path, help="where to write it; default: by the artifact")
    verify = command("verify", "checksums, counts and references", "verify propose")
    verify.add_argument(
        "stage", nargs="?", default="all", help="a stage's folder name; default: all"
    )
    invalidate = command(
        "invalidate", "delete current artifacts", "invalidate propose --downstream"
    )
    invalidate.add_argument("stage", help="a stage's folder name (propose)")
    invalidate.add_argument("--downstream", action="store_true", help="and what was made from them")
    gc = command("gc", "artifacts that nothing current refers to", "gc --delete")
    gc.add_argument("--delete", action="store_true", help="delete them; else only list them")
    diff = command("diff", "two artifacts of a stage", "diff PATH_A PATH_B")
    diff.add_argument("one", type=Path)
    diff.add_argument("other", type=Path)
    predict = command("predict", "what a policy says is on images", "predict photo.jpg")
    predict_command.add_arguments(predict)
    for each in (status, plan, verify, gc, diff):
        each.add_argument("--json", action="store_true", help="print JSON, for scripts")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `head` has seen enough
    if arguments.recipe:
        os.environ["RECIPE"] = arguments.recipe
    if arguments.command == "status":
        sys.exit(show_status(arguments))
    if arguments.command == "predict":
        from pipeline.predict import settings

        sys.exit(predict_command.predict(arguments, settings(arguments)))
    if arguments.command == "plan":
        sys.exit(show_plan(arguments))
    root, dataset = _places(arguments.dataset)
    folder = root / dataset
    if arguments.command == "where":
        show_report(folder)
    elif arguments.command == "inspect":
        show_stage(folder, arguments.stage, arguments.rows, arguments.questions, arguments.page)
    elif arguments.command == "verify":
        sys.exit(verify_artifacts(root, folder, arguments))
    elif arguments.command == "diff":
        show_differences(arguments)
    elif arguments.command == "invalidate":
        invalidate_stage(root, folder, arguments.stage, arguments.downstream)
    else:
        collect_garbage(root, arguments)


def show_status(arguments: Any) -> int:
    """Print the graph; the stages that share a set's images with other runs are part of it."""
    from pipeline import status
    from pipeline.tasks import TrainDiVE

    given = {
        name: value
        for name in ("dataset", "method", "seed")
        if (value := getattr(arguments, name)) is not None
    }
    rows = [status.describe(stage) for stage in status.graph(TrainDiVE(**given))]
    print(json.dumps(rows, indent=1) if arguments.json else "\n".join(status.lines(rows)))
    return 0


def show_plan(arguments: Any) -> int:
    """Print what a run of TrainDiVE will take."""
    from pipeline import plan
    from pipeline.tasks import TrainDiVE

    given = {
        name: value
        for name in ("dataset", "method", "seed")
        if (value := getattr(arguments, name)) is not None
    }
    chosen = TrainDiVE(**given)
    told = {name: getattr(arguments, name) for name in plan.Given.__dataclass_fields__}
    found = plan.plan(chosen.dataset, chosen.method, chosen.seed, plan.Given(**told))
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(plan.lines(found)))
    return 0


def verify_artifacts(root: Path, folder: Path, arguments: Any) -> int:
    """Print every problem of a stage's current artifacts, or of all there are; 1 if there is one."""
    from pipeline import status, verify

    chosen = (
        list(status.artifacts(root))
        if arguments.stage == "all"
        else [path.resolve() for path in current(folder, arguments.stage)]
    )
    found = verify.check(root, chosen)
    if arguments.json:
        print(json.dumps({"artifacts": len(chosen), "problems": found}, indent=1))
    else:
        print("\n".join([*found, f"{len(chosen)} artifacts, {len(found)} problems"]))
    return 1 if found else 0


def show_differences(arguments: Any) -> None:
    """Print what two artifacts differ in."""
    from pipeline import status

    for path in (arguments.one, arguments.other):
        if not (path / "manifest.json").exists():
            sys.exit(f"error: {path} is no artifact: it has no manifest.json")
    told = status.compare(arguments.one, arguments.other)
    print(json.dumps(told, indent=1) if arguments.json else "\n".join(told))


def invalidate_stage(root: Path, folder: Path, stage: str, downstream: bool) -> None:
    """Delete a stage's current artifacts and, if asked, those made from them."""
    from pipeline import artifact, status

    chosen = [path.resolve() for path in current(folder, stage)]
    if downstream:
        chosen += [below for path in list(chosen) for below in status.downstream(root, path.name)]
    for path in dict.fromkeys(chosen):
        artifact.remove(path)
        link = path.parent / "current"
        if link.is_symlink() and not link.exists():
            link.unlink()
        print(f"deleted {_short(path)}")


def collect_garbage(root: Path, arguments: Any) -> None:
    """List, or delete, the artifacts that nothing current refers to."""
    from pipeline import artifact, status

    found = status.garbage(root)
    if arguments.delete:
        for path, _ in found:
            artifact.remove(path)
    if arguments.json:
        print(json.dumps([{"folder": str(path), "bytes": size} for path, size in found], indent=1))
        return
    for path, size in found:
        print(f"{size / 1e6:9.1f} MB  {_short(path)}")
    done = "deleted" if arguments.delete else "would be deleted by --delete"
    print(f"{len(found)} artifacts, {sum(size for _, size in found) / 1e6:.1f} MB, {done}")


def current(folder: Path, stage: str) -> list[Path]:
    """The `current` links of a stage; leaves with the nearest name when there are none."""
    found = sorted([*folder.rglob(f"{stage}/current"), *folder.rglob(f"{stage}/*/current")])
    if not found:
        names = {
            part
            for link in folder.rglob("current")
            for part in (link.parent.name, link.parent.parent.name)
        }
        names -= {folder.name}
        close = difflib.get_close_matches(stage, sorted(names), 1)
        told = (
            f"did you mean {close[0]}?"
            if close
            else f"there are: {', '.join(sorted(names)) or 'none'}"
        )
        sys.exit(f"error: no artifact {stage!r} under {folder}; {told}")
    return found


def show_report(folder: Path) -> None:
    """Print where the newest report and policy of a dataset lie."""
    found = [*folder.glob("*/report/current"), *folder.glob("*/report/*/current")]
    reports = sorted(found, key=lambda path: path.stat().st_mtime)
    if not reports:
        sys.exit(f"error: no report under {folder} yet; run: make train")
    newest = reports[-1].parent
    # Of a mix, each set has a report of its own, beside the others.
    beside = [newest] if newest.name == "report" else sorted(newest.parent.glob("*"))
    for place in beside:
        print(f"report     {_short(place / 'current')}/index.html")
    method = newest if newest.name == "report" else newest.parent
    trains = sorted(method.parent.glob("round*/train/current"))
    if trains:
        print(f"policy     {_short(trains[-1])}")
    if (folder / "compare" / "current").exists():
        print(f"comparison {_short(folder / 'compare' / 'current')}/index.html")
    print(f"artifacts  {_short(folder)}  (python -m pipeline inspect build_mcq)")


def show_stage(folder: Path, stage: str, rows: int, questions: int, page: Path | None) -> None:
    """Print a stage's manifest facts and the first rows of each table, of every current artifact.

    Of BuildMCQ also write a page with so many `questions`, to `page` or beside the artifact.
    """
    path = Path(stage)
    found = [path] if (path / "manifest.json").exists() else current(folder, stage)
    import pandas as pd
    import pyarrow.parquet as pq

    for artifact in found:
        manifest = json.loads((artifact / "manifest.json").read_text())
        print(f"\n{manifest['stage']} {manifest['fingerprint']}  {_short(artifact)}")
        print(f"  rows {manifest['rows']}, {manifest['seconds']} s")
        stats = artifact / "stats.json"
        if manifest["stage"] == "BuildMCQ" and manifest.get("code_version", 1) > 1:
            _show_questions(artifact, manifest, questions, page)
        elif stats.exists():
            print("  " + "\n  ".join(f"{k}: {v}" for k, v in json.loads(stats.read_text()).items()))
        for table in manifest["rows"]:
            first = next(iter(sorted(artifact.glob(f"{table}*.parquet"))))
            head = next(pq.ParquetFile(first).iter_batches(max(rows, 1)), None)
            if head is None or rows < 1:
                continue
            frame = head.to_pandas()
            for column in frame.columns:
                frame[column] = frame[column].map(_short_value)
            print(f"\n  {first.name}")
            with pd.option_context("display.max_colwidth", 60, "display.width", 160):
                print("    " + frame.T.to_string(header=False).replace("\n", "\n    "))


def _show_questions(artifact: Path, manifest: dict, questions: int, page: Path | None) -> None:
    """Print the counts of a BuildMCQ artifact and write its page."""
    from tasks.mcq_page import facts, questions_page

    stats = json.loads((artifact / "stats.json").read_text())
    for name, value in facts(stats):
        print(f"  {name}: {value}")
    title = f"Questions of {manifest.get('dataset', 'a set')}, {manifest['fingerprint']}"
    path = page or artifact.resolve().with_suffix(".html")
    try:
        path.write_text(questions_page(artifact, stats, title, questions), encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: cannot write {path} ({error.strerror}); give another place: --page FILE")
    print(f"  page: {_short(path)}")


def _places(dataset: str | None) -> tuple[Path, str]:
    """The artifact root and dataset of luigi.cfg."""
    from configparser import ConfigParser

    config = ConfigParser(interpolation=None)
    overlays = [os.environ.get("LUIGI_CONFIG_PATH", ""), *os.environ.get("RECIPE", "").split(",")]
    config.read(["luigi.cfg", *filter(None, overlays)])
    if not config.has_section("run"):
        sys.exit("error: no luigi.cfg with a [run] section here; run this in the project's folder")
    names = (dataset or config["run"]["dataset"]).split("+")
    return Path(config["run"]["artifacts"]), "+".join(sorted(names))


def _short(path: Path) -> str:
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _short_value(value: object) -> object:
    if isinstance(value, dict) and "bytes" in value:
        return f"<image, {len(value['bytes'])} bytes>"
    return repr(value) if isinstance(value, str) else value


if __name__ == "__main__":
    main()
