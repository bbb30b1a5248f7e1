"""Look at what a run left behind.

python -m pipeline where              the last report's figures, and where everything lies
python -m pipeline inspect build_mcq  counts and sample rows of a stage's current artifact; for
                                      build_mcq also a page of questions, to filter and to look at
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    where = commands.add_parser("where", help="the last report's figures and the folders")
    where.add_argument("--dataset", help="a data card's name; default: that of luigi.cfg")
    inspect = commands.add_parser(
        "inspect",
        help="counts and sample rows",
        epilog="example: python -m pipeline inspect build_mcq",
    )
    inspect.add_argument(
        "stage", help="a stage's folder name (build_mcq), or a path to an artifact"
    )
    inspect.add_argument("--dataset", help="a data card's name; default: that of luigi.cfg")
    inspect.add_argument("--rows", type=int, default=3, help="sample rows a table")
    inspect.add_argument("--questions", type=int, default=300, help="questions on the page")
    inspect.add_argument("--page", type=Path, help="where to write it; default: by the artifact")
    arguments = parser.parse_args()
    root, dataset = _places(arguments.dataset)
    if arguments.command == "where":
        show_report(root / dataset)
    else:
        show_stage(
            root / dataset, arguments.stage, arguments.rows, arguments.questions, arguments.page
        )


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
    print(f"artifacts  {_short(folder)}  (python -m pipeline inspect build_mcq)")


def show_stage(folder: Path, stage: str, rows: int, questions: int, page: Path | None) -> None:
    """Print a stage's manifest facts and the first rows of each table, of every current artifact.

    Of BuildMCQ also write a page with so many `questions`, to `page` or beside the artifact.
    """
    path = Path(stage)
    found = (
        [path]
        if (path / "manifest.json").exists()
        else sorted([*folder.rglob(f"{stage}/current"), *folder.rglob(f"{stage}/*/current")])
    )
    if not found:
        names = sorted({p.parent.name for p in folder.rglob("current")})
        sys.exit(
            f"error: no artifact {stage!r} under {folder}; there are: {', '.join(names) or 'none'}"
        )
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
    config.read("luigi.cfg")
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
