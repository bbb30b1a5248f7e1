"""The commands of `python -m pipeline` that check a graph or change artifacts; each prints its result."""

import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.cli.show import current, short_path
from tasks.tables.manifest import FILE as MANIFEST


def show_status(arguments: Any) -> int:
    """Print the graph of a task: as a tree, or as JSON with one object a stage."""
    from pipeline import tasks
    from pipeline.cli import status, tree
    from pipeline.settings import known_keys
    from pipeline.stage import Stage

    if arguments.task not in (known := known_keys()) or not arguments.task[0].isupper():
        names = sorted(name for name in known if name[0].isupper())
        close = difflib.get_close_matches(arguments.task, names, 1) or [", ".join(names)]
        sys.exit(f"error: no task {arguments.task!r}; did you mean {close[0]}?")
    kind = getattr(tasks, arguments.task)
    parameters = {
        name: value
        for name, _ in kind.get_params()
        if (value := getattr(arguments, name, None)) is not None
    }
    task = kind(**parameters)
    rows = [status.describe(stage) for stage in status.graph(task)]
    if arguments.json:
        todo = tree.would_run(rows)
        rows = [{**row, "would_run": row["fingerprint"] in todo} for row in rows]
        print(json.dumps(rows, indent=1))
        return 0
    # A stage of one set is the tree's root. Several stages of a mix, or reports, need a title above.
    is_root = isinstance(task, Stage) and not task.parts()
    words = [str(getattr(task, name)) for name in ("dataset", "method") if hasattr(task, name)]
    title = "" if is_root else " ".join([arguments.task, *words])
    print("\n".join(tree.lines(rows, title, ascii_only=not _can_print("".join(tree.BRANCHES)))))
    return 0


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

    task = _of_run(TrainDiVE, arguments)
    estimates = {name: getattr(arguments, name) for name in plan.Estimates.__dataclass_fields__}
    summary = plan.plan(task.dataset, task.method, task.seed, plan.Estimates(**estimates))
    print(json.dumps(summary, indent=1) if arguments.json else "\n".join(plan.lines(summary)))
    return 0


def show_rehearsal(arguments: Any) -> int:
    """Print each point of a rehearsal once it is known, then the verdict.

    Returns 1 if a point has to be mended.
    """
    from pipeline.cli.rehearse import MEND, OPEN, rehearse
    from pipeline.cli.trial import trial
    from pipeline.tasks import TrainDiVE
    from tasks.runtime.machine import gpus

    task = _of_run(TrainDiVE, arguments)
    run = (task.dataset, task.method, task.seed)
    points = []

    def show(checked: Iterable[Any]) -> None:
        for point in checked:
            points.append(point)
            if not arguments.json:
                print(f"{point.state:6} {point.what:18} {point.sentence}", flush=True)

    show(rehearse(*run, step=not arguments.no_step))
    mend = [point for point in points if point.state == MEND]
    wanted = arguments.trial == "yes" or (arguments.trial == "auto" and bool(gpus()))
    if wanted and not mend:
        show(trial(*run))
        mend = [point for point in points if point.state == MEND]
    if arguments.json:
        print(json.dumps([point._asdict() for point in points], indent=1))
        return int(bool(mend))
    unknown = sum(point.state == OPEN for point in points)
    left = f"; {unknown} could not be told on this machine" if unknown else ""
    print(f"\n{f'{len(mend)} to mend' if mend else 'ready'}{left}")
    for point in mend:
        print(f"  {point.what}: {point.sentence}")
    return int(bool(mend))


def _of_run(kind: Any, arguments: Any) -> Any:
    """The task with the dataset, method and seed of the command line, else of luigi.cfg."""
    names = ("dataset", "method", "seed")
    return kind(**{n: v for n in names if (v := getattr(arguments, n)) is not None})


def verify_artifacts(root: Path, folder: Path, arguments: Any) -> int:
    """Print every problem of a stage's current artifacts, or of all artifacts; 1 if there is one."""
    from pipeline.cli import status, verify

    folders = (
        list(status.artifacts(root))
        if arguments.stage == "all"
        else [path.resolve() for path in current(folder, arguments.stage)]
    )
    problems = verify.check(root, folders, arguments.quick)
    if arguments.json:
        print(json.dumps({"artifacts": len(folders), "problems": problems}, indent=1))
    else:
        print("\n".join([*problems, f"{len(folders)} artifacts, {len(problems)} problems"]))
    return 1 if problems else 0


def show_differences(arguments: Any) -> None:
    """Print how two artifacts differ."""
    from pipeline.cli import status

    for path in (arguments.one, arguments.other):
        if not (path / MANIFEST).exists():
            sys.exit(f"error: {path} is no artifact: it has no {MANIFEST}")
    lines = status.compare(arguments.one, arguments.other)
    print(json.dumps(lines, indent=1) if arguments.json else "\n".join(lines))


def invalidate_stage(root: Path, folder: Path, arguments: Any) -> None:
    """Delete a stage's current artifacts and, with `--downstream`, all that were made from them."""
    from pipeline.artifacts import store
    from pipeline.cli import status

    folders = [path.resolve() for path in current(folder, arguments.stage)]
    if arguments.downstream:
        folders += [below for path in list(folders) for below in status.downstream(root, path.name)]
    deleted = list(dict.fromkeys(folders))
    for path in deleted:
        store.remove(path)
        link = path.parent / "current"
        if link.is_symlink() and not link.exists():
            link.unlink()
        if not arguments.json:
            print(f"deleted {short_path(path)}")
    if arguments.json:
        print(json.dumps([str(path) for path in deleted], indent=1))


def collect_garbage(root: Path, arguments: Any) -> None:
    """List, or delete, the artifacts that no current one needs, and abandoned working folders."""
    from pipeline.artifacts import store
    from pipeline.cli import status
    from pipeline.cli.clean import leftovers, remove

    unneeded = status.garbage(root)
    working = leftovers(root, arguments.partial_older_than)
    gone = {each.folder for each in working if not each.kept}
    if arguments.delete:
        for path, _ in unneeded:
            store.remove(path)
        gone = {each.folder for each in working if not each.kept and remove(each)}
    if arguments.json:
        summary = {
            "artifacts": [{"folder": str(path), "bytes": size} for path, size in unneeded],
            "partial": [{**asdict(each), "folder": str(each.folder)} for each in working],
        }
        print(json.dumps(summary, indent=1))
        return
    for path, size in unneeded:
        print(f"{size / 1e6:9.1f} MB  {short_path(path)}")
    done = "deleted" if arguments.delete else "would be deleted by --delete"
    print(f"{len(unneeded)} artifacts, {sum(size for _, size in unneeded) / 1e6:.1f} MB, {done}")
    if not working:
        return
    print("\nworking folders of runs that were cut off:")
    for each in working:
        verdict = "goes" if each.folder in gone else "stays"
        print(
            f"{each.bytes / 1e6:9.1f} MB  {each.days:5.1f} days  {verdict:5}  "
            f"{short_path(each.folder)}"
        )
        print(f"{'':33}{each.why}")
    freed = sum(each.bytes for each in working if each.folder in gone) / 1e6
    print(f"{len(gone)} of {len(working)} working folders, {freed:.1f} MB, {done}")
