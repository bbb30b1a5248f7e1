"""Print what lies in the artifact root: the newest report, and the contents of a stage's artifacts."""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from pipeline.config_files import read_into
from tasks.tables.manifest import FILE as MANIFEST


def configured_root(dataset: str | None) -> tuple[Path, str]:
    """The artifact root of luigi.cfg, and the dataset: the one given, else that of luigi.cfg."""
    from configparser import ConfigParser

    config = ConfigParser(interpolation=None)
    overlays = [os.environ.get("LUIGI_CONFIG_PATH", ""), *os.environ.get("RECIPE", "").split(",")]
    for path in map(Path, ("luigi.cfg", *filter(None, overlays))):
        if path.is_file():
            read_into(config, path)
    if not config.has_section("run"):
        sys.exit("error: no luigi.cfg with a [run] section here; run this in the project's folder")
    names = (dataset or config["run"]["dataset"]).split("+")
    return Path(config["run"]["artifacts"]), "+".join(sorted(names))


def current(folder: Path, stage: str) -> list[Path]:
    """The `current` links of a stage below a dataset's folder.

    Exits with the nearest stage name when there are none.
    """
    links = sorted([*folder.rglob(f"{stage}/current"), *folder.rglob(f"{stage}/*/current")])
    shared = folder.parent / stage / "current"  # of an artifact that belongs to no dataset
    if not links and shared.is_symlink():
        return [shared]
    if not links:
        names = {
            part
            for link in folder.rglob("current")
            for part in (link.parent.name, link.parent.parent.name)
        }
        names -= {folder.name}
        close = difflib.get_close_matches(stage, sorted(names), 1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else f"there are: {', '.join(sorted(names)) or 'none'}"
        )
        sys.exit(f"error: no artifact {stage!r} under {folder}; {hint}")
    return links


def short_path(path: Path) -> str:
    """A path from the working directory on, where it lies below."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show_report(folder: Path, as_json: bool = False) -> None:
    """Print the figures of a dataset's newest report, and the paths of it, its policy and a comparison."""
    links = [*folder.glob("*/report/current"), *folder.glob("*/report/*/current")]
    reports = sorted(links, key=lambda path: path.stat().st_mtime)
    if not reports:
        sys.exit(f"error: no report under {folder} yet; run: make train")
    newest = reports[-1].parent
    # A mix has one report folder for each of its sets, side by side.
    all_reports = [newest] if newest.name == "report" else sorted(newest.parent.glob("*"))
    method = newest if newest.name == "report" else newest.parent
    trains = sorted(method.parent.glob("round*/train/current"))
    lines = [("report", f"{short_path(report / 'current')}/index.html") for report in all_reports]
    lines += [("policy", short_path(trains[-1]))] if trains else []
    if (folder / "compare" / "current").exists():
        lines.append(("comparison", f"{short_path(folder / 'compare' / 'current')}/index.html"))
    lines.append(("artifacts", short_path(folder)))
    if as_json:
        paths: dict[str, list[str]] = {}
        for name, path in lines:
            paths.setdefault(name, []).append(path)
        print(json.dumps(paths, indent=1))
        return
    from tasks.pages.text import summary

    for report in all_reports:
        metrics = json.loads((report / "current" / "metrics.json").read_text(encoding="utf-8"))
        print(f"{summary(metrics)}\n")
    for name, path in lines:
        print(f"{name:10} {path}")
    print(f"{'':10} python -m pipeline inspect build_mcq")


def show_stage(folder: Path, arguments: Any) -> None:
    """Print a stage's current artifacts: manifest, columns, and the first rows of each table.

    For BuildMCQ it also writes the page of questions. For any other stage, or with a filter, it
    writes a page of rows where `--page` asks for one.
    """
    from pipeline.cli import inspect

    path = Path(arguments.stage)
    artifacts = [path] if (path / MANIFEST).exists() else current(folder, arguments.stage)
    rows = 3 if arguments.rows is None else arguments.rows
    described = [inspect.described(artifact, rows, arguments.where) for artifact in artifacts]
    if arguments.json:
        print(json.dumps(described, indent=1, default=str))
    for artifact, facts in zip(artifacts, described, strict=True):
        # Open questions have no candidates, and no page of their own.
        questions = any(artifact.glob("candidates-*.parquet")) and not arguments.where
        page = arguments.page
        if page and len(artifacts) > 1:  # two rounds give two pages
            page = page.with_stem(f"{page.stem}-{facts['fingerprint']}")
        if not arguments.json:
            _print_facts(facts, questions)
        if questions and not arguments.json:
            _show_questions(artifact, facts, arguments.questions, page)
        elif page:
            size = 100 if arguments.rows is None else arguments.rows
            out = sys.stderr if arguments.json else sys.stdout
            _write_page(page, inspect.page(artifact, size, arguments.where), out)


def _print_facts(facts: dict[str, Any], questions: bool) -> None:
    print(f"\n{facts['stage']} {facts['fingerprint']}  {short_path(Path(facts['folder']))}")
    memory = f", {facts['peak_memory_mb']} MB at most" if facts.get("peak_memory_mb") else ""
    print(f"  rows {facts['rows']}, {facts['seconds']} s{memory}")
    for name, value in (facts["stats"] or {}).items() if not questions else ():
        print(f"  {name}: {value}")
    for table in facts["tables"]:
        fit = f", {table['fit']:,} fit" if table["fit"] != table["rows"] else ""
        print(f"\n  {table['table']}: {table['rows']:,} rows{fit}")
        width = max(map(len, table["columns"]))
        for name, kind in table["columns"].items():
            values = " | ".join(_cut(row[name]) for row in table["first"])
            print(f"    {name:{width}}  {kind[:24]:24}  {values}".rstrip())


def _cut(value: Any, size: int = 40) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= size else f"{text[: size - 1]}…"


def _write_page(path: Path, text: str, out: TextIO | None = None) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.exit(f"error: cannot write {path} ({error.strerror}); give another place: --page FILE")
    print(f"  page: {short_path(path)}", file=out)


def _show_questions(
    artifact: Path, facts_of: dict[str, Any], questions: int, page: Path | None
) -> None:
    """Print the counts of a BuildMCQ artifact and write its page."""
    from tasks.pages.questions import facts, questions_page

    stats = json.loads((artifact / "stats.json").read_text())
    for name, value in facts(stats):
        print(f"  {name}: {value}")
    title = f"Questions of {facts_of.get('dataset', 'a set')}, {facts_of['fingerprint']}"
    path = page or artifact.resolve().with_suffix(".html")
    _write_page(path, questions_page(artifact, stats, title, questions))
