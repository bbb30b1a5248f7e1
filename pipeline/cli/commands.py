"""What the commands of `python -m pipeline` do: each prints, on folders and artifacts alone."""

import difflib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO


def show_status(arguments: Any) -> int:
    """Print the graph of a task as a tree, or its stages as a flat list of values."""
    from pipeline import tasks
    from pipeline.cli import status, tree
    from pipeline.settings import known_keys
    from pipeline.stage import Stage

    if arguments.task not in (known := known_keys()) or not arguments.task[0].isupper():
        names = sorted(name for name in known if name[0].isupper())
        close = difflib.get_close_matches(arguments.task, names, 1) or [", ".join(names)]
        sys.exit(f"error: no task {arguments.task!r}; did you mean {close[0]}?")
    task = getattr(tasks, arguments.task)
    given = {
        name: value
        for name, _ in task.get_params()
        if (value := getattr(arguments, name, None)) is not None
    }
    chosen = task(**given)
    rows = [status.describe(stage) for stage in status.graph(chosen)]
    if arguments.json:
        todo = tree.would_run(rows)
        rows = [{**row, "would_run": row["fingerprint"] in todo} for row in rows]
        print(json.dumps(rows, indent=1))
        return 0
    # A stage of one set is the root itself; several of a mix, or reports, hang below what was asked.
    itself = isinstance(chosen, Stage) and not chosen.parts()
    title = "" if itself else " ".join([arguments.task, *_told(chosen, "dataset", "method")])
    print("\n".join(tree.lines(rows, title, ascii_only=not _can_print("".join(tree.BRANCHES)))))
    return 0


def _told(task: Any, *names: str) -> list[str]:
    return [str(getattr(task, name)) for name in names if hasattr(task, name)]


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def show_plan(arguments: Any) -> int:
    """Print what a run of TrainDiVE will take."""
    from pipeline.cli import plan
    from pipeline.tasks import TrainDiVE

    chosen = _of_run(TrainDiVE, arguments)
    told = {name: getattr(arguments, name) for name in plan.Given.__dataclass_fields__}
    found = plan.plan(chosen.dataset, chosen.method, chosen.seed, plan.Given(**told))
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(plan.lines(found)))
    return 0


def show_rehearsal(arguments: Any) -> int:
    """Print each point of a rehearsal as it is known, and the verdict; 1 if there is one to mend."""
    from pipeline.cli.rehearse import MEND, OPEN, rehearse
    from pipeline.cli.trial import trial
    from pipeline.tasks import TrainDiVE
    from tasks.runtime.machine import gpus

    chosen = _of_run(TrainDiVE, arguments)
    given = (chosen.dataset, chosen.method, chosen.seed)
    points = []

    def show(found: Iterable[Any]) -> None:
        for point in found:
            points.append(point)
            if not arguments.json:
                print(f"{point.state:6} {point.what:18} {point.told}", flush=True)

    show(rehearse(*given, step=not arguments.no_step))
    mend = [point for point in points if point.state == MEND]
    wanted = arguments.trial == "yes" or (arguments.trial == "auto" and bool(gpus()))
    if wanted and not mend:
        show(trial(*given))
        mend = [point for point in points if point.state == MEND]
    if arguments.json:
        print(json.dumps([point._asdict() for point in points], indent=1))
        return int(bool(mend))
    unknown = sum(point.state == OPEN for point in points)
    left = f"; {unknown} could not be told on this machine" if unknown else ""
    print(f"\n{f'{len(mend)} to mend' if mend else 'ready'}{left}")
    for point in mend:
        print(f"  {point.what}: {point.told}")
    return int(bool(mend))


def _of_run(task: Any, arguments: Any) -> Any:
    """The task with the dataset, method and seed of the command line, else of luigi.cfg."""
    names = ("dataset", "method", "seed")
    return task(**{n: v for n in names if (v := getattr(arguments, n)) is not None})


def verify_artifacts(root: Path, folder: Path, arguments: Any) -> int:
    """Print every problem of a stage's current artifacts, or of all there are; 1 if there is one."""
    from pipeline.cli import status, verify

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
    from pipeline.cli import status

    for path in (arguments.one, arguments.other):
        if not (path / "manifest.json").exists():
            sys.exit(f"error: {path} is no artifact: it has no manifest.json")
    told = status.compare(arguments.one, arguments.other)
    print(json.dumps(told, indent=1) if arguments.json else "\n".join(told))


def invalidate_stage(root: Path, folder: Path, arguments: Any) -> None:
    """Delete a stage's current artifacts and, if asked, those made from them."""
    from pipeline.artifacts import store
    from pipeline.cli import status

    chosen = [path.resolve() for path in current(folder, arguments.stage)]
    if arguments.downstream:
        chosen += [below for path in list(chosen) for below in status.downstream(root, path.name)]
    deleted = list(dict.fromkeys(chosen))
    for path in deleted:
        store.remove(path)
        link = path.parent / "current"
        if link.is_symlink() and not link.exists():
            link.unlink()
        if not arguments.json:
            print(f"deleted {_short(path)}")
    if arguments.json:
        print(json.dumps([str(path) for path in deleted], indent=1))


def collect_garbage(root: Path, arguments: Any) -> None:
    """List, or delete, artifacts that nothing current refers to and working folders of no use."""
    from pipeline.artifacts import store
    from pipeline.cli import status
    from pipeline.cli.clean import leftovers, remove

    found = status.garbage(root)
    working = leftovers(root, arguments.partial_older_than)
    gone = {each.folder for each in working if not each.kept}
    if arguments.delete:
        for path, _ in found:
            store.remove(path)
        gone = {each.folder for each in working if not each.kept and remove(each)}
    if arguments.json:
        told = {
            "artifacts": [{"folder": str(path), "bytes": size} for path, size in found],
            "partial": [{**asdict(each), "folder": str(each.folder)} for each in working],
        }
        print(json.dumps(told, indent=1))
        return
    for path, size in found:
        print(f"{size / 1e6:9.1f} MB  {_short(path)}")
    done = "deleted" if arguments.delete else "would be deleted by --delete"
    print(f"{len(found)} artifacts, {sum(size for _, size in found) / 1e6:.1f} MB, {done}")
    if not working:
        return
    print("\nworking folders of runs that were cut off:")
    for each in working:
        kept = "goes" if each.folder in gone else "stays"
        print(f"{each.bytes / 1e6:9.1f} MB  {each.days:5.1f} days  {kept:5}  {_short(each.folder)}")
        print(f"{'':33}{each.why}")
    freed = sum(each.bytes for each in working if each.folder in gone) / 1e6
    print(f"{len(gone)} of {len(working)} working folders, {freed:.1f} MB, {done}")


def current(folder: Path, stage: str) -> list[Path]:
    """The `current` links of a stage; leaves with the nearest name when there are none."""
    found = sorted([*folder.rglob(f"{stage}/current"), *folder.rglob(f"{stage}/*/current")])
    beside = folder.parent / stage / "current"  # of an artifact that is no set's
    if not found and beside.is_symlink():
        return [beside]
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


def show_report(folder: Path, as_json: bool = False) -> None:
    """Print where the newest report and policy of a dataset lie."""
    found = [*folder.glob("*/report/current"), *folder.glob("*/report/*/current")]
    reports = sorted(found, key=lambda path: path.stat().st_mtime)
    if not reports:
        sys.exit(f"error: no report under {folder} yet; run: make train")
    newest = reports[-1].parent
    # Of a mix, each set has a report of its own, beside the others.
    beside = [newest] if newest.name == "report" else sorted(newest.parent.glob("*"))
    method = newest if newest.name == "report" else newest.parent
    trains = sorted(method.parent.glob("round*/train/current"))
    told = [("report", f"{_short(place / 'current')}/index.html") for place in beside]
    told += [("policy", _short(trains[-1]))] if trains else []
    if (folder / "compare" / "current").exists():
        told.append(("comparison", f"{_short(folder / 'compare' / 'current')}/index.html"))
    told.append(("artifacts", _short(folder)))
    if as_json:
        places: dict[str, list[str]] = {}
        for name, place in told:
            places.setdefault(name, []).append(place)
        print(json.dumps(places, indent=1))
        return
    for name, place in told:
        print(f"{name:10} {place}")
    print(f"{'':10} python -m pipeline inspect build_mcq")


def show_stage(folder: Path, arguments: Any) -> None:
    """Print manifest facts, columns and the first rows of each table of every current artifact.

    Of BuildMCQ also write its page of questions; of any other, or of the rows that a filter
    leaves, a page where one is asked for.
    """
    from pipeline.cli import inspect

    path = Path(arguments.stage)
    found = [path] if (path / "manifest.json").exists() else current(folder, arguments.stage)
    rows = 3 if arguments.rows is None else arguments.rows
    told = [inspect.described(place, rows, arguments.where) for place in found]
    if arguments.json:
        print(json.dumps(told, indent=1, default=str))
    for place, facts in zip(found, told, strict=True):
        questions = facts["stage"] == "BuildMCQ" and not arguments.where
        page = arguments.page
        if page and len(found) > 1:  # of two rounds, two pages
            page = page.with_stem(f"{page.stem}-{facts['fingerprint']}")
        if not arguments.json:
            _print_facts(facts, questions)
        if questions and not arguments.json:
            _show_questions(place, facts, arguments.questions, page)
        elif page:
            size = 100 if arguments.rows is None else arguments.rows
            out = sys.stderr if arguments.json else sys.stdout
            _write_page(page, inspect.page(place, size, arguments.where), out)


def _print_facts(facts: dict[str, Any], questions: bool) -> None:
    print(f"\n{facts['stage']} {facts['fingerprint']}  {_short(Path(facts['folder']))}")
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
    print(f"  page: {_short(path)}", file=out)


def _show_questions(artifact: Path, manifest: dict, questions: int, page: Path | None) -> None:
    """Print the counts of a BuildMCQ artifact and write its page."""
    from tasks.pages.questions import facts, questions_page

    stats = json.loads((artifact / "stats.json").read_text())
    for name, value in facts(stats):
        print(f"  {name}: {value}")
    title = f"Questions of {manifest.get('dataset', 'a set')}, {manifest['fingerprint']}"
    path = page or artifact.resolve().with_suffix(".html")
    _write_page(path, questions_page(artifact, stats, title, questions))


def places(dataset: str | None) -> tuple[Path, str]:
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
