"""Draws a task's graph as a tree for the terminal: each stage, its state, and its inputs below.

When a stage reads an input both directly and through another input, the tree shows it only below
the latter. A stage that several others read is drawn once, and then as `(above)`.
"""

import textwrap
import time
from calendar import timegm
from collections.abc import Iterator, Sequence
from typing import Any

from tasks.runtime.protocol import ZERO_SHOT

WIDTH = 118  # columns at which reasons are wrapped
SHOWN = 6  # names of changed inputs at most
BRANCHES = ("├─ ", "└─ ", "│  ", "   ")  # a child, the last child, and the guides below these two
BRANCHES_ASCII = ("|- ", "`- ", "|  ", "   ")

Row = dict[str, Any]  # as `status.describe` returns it


def would_run(rows: Sequence[Row]) -> set[str]:
    """Fingerprints of the stages that a run would execute: a complete stage ends the search."""
    by_name = {row["fingerprint"]: row for row in rows}
    below = _requires(by_name)
    todo: set[str] = set()
    waiting = roots(rows)
    while waiting:
        name = waiting.pop()
        if by_name[name]["state"] != "done" and name not in todo:
            todo.add(name)
            waiting += below[name]
    return todo


def _requires(by_name: dict[str, Row]) -> dict[str, list[str]]:
    """Each stage's required stages, as far as they are shown."""
    return {
        name: [below for below in dict.fromkeys(row["requires"]) if below in by_name]
        for name, row in by_name.items()
    }


def roots(rows: Sequence[Row]) -> list[str]:
    """Fingerprints of the stages that none of the others requires."""
    required = {name for row in rows for name in row["requires"]}
    return [name for name in dict.fromkeys(row["fingerprint"] for row in rows) if name not in required]  # fmt: skip


def lines(rows: Sequence[Row], title: str = "", ascii_only: bool = False) -> list[str]:
    """The tree with its columns, and how many stages a run would execute.

    `title` stands above several roots, or above the one root of a task that is no stage itself.
    """
    by_name = {row["fingerprint"]: row for row in rows}
    branches = BRANCHES_ASCII if ascii_only else BRANCHES
    names, todo = _names(rows), would_run(rows)
    tree = list(_walk(_children(by_name), roots(rows), branches, hangs=bool(title)))
    width = max([len(title), *(len(guide) + len(names[name]) for guide, _, name, _ in tree)])
    output = [f"{title:{width}}  {'state':7}  {'rows':>11}  {'size':>8}  {'took':>8}  made"]
    for guide, below, name, again in tree:
        label = f"{guide}{names[name]}"
        if again:
            output.append(f"{label} (above)")
            continue
        row = by_name[name]
        output.append(f"{label:{width}}  {row['state']:7}  {_facts(row, name in todo)}".rstrip())
        for why in _reasons(row["why"]):
            indent = f"{below:{width}}    "
            output += textwrap.wrap(
                why, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
                break_long_words=False,
            )  # fmt: skip
    return [*output, "", f"a run would do {len(todo)} of {len(by_name)} stages"]


def _walk(
    children: dict[str, list[str]], tops: list[str], branches: Sequence[str], hangs: bool
) -> Iterator[tuple[str, str, str, bool]]:
    """The lines of the tree: (guide before the stage, guide before lines below it, stage, repeated).

    With `hangs` the stages `tops` are drawn as children of a line above them.
    """
    child, last, beside, nothing = branches
    seen: set[str] = set()

    def visit(names: list[str], guide: str, drawn: bool) -> Iterator[tuple[str, str, str, bool]]:
        for name in names:
            ends = name == names[-1]
            own, under = ((last, nothing) if ends else (child, beside)) if drawn else ("", "")
            again = name in seen
            deeper = [] if again else children[name]
            below = guide + under
            yield guide + own, below + (beside if deeper else nothing), name, again
            seen.add(name)
            yield from visit(deeper, below, True)

    yield from visit(tops, "", hangs)


def _children(by_name: dict[str, Row]) -> dict[str, list[str]]:
    """Each stage's required stages, without those that another of them requires."""
    requires = _requires(by_name)
    reach: dict[str, set[str]] = {}

    def everything(name: str) -> set[str]:
        if name not in reach:
            reach[name] = set(requires[name]).union(*map(everything, requires[name]))
        return reach[name]

    children = {}
    for name, direct in requires.items():
        indirect = set().union(*map(everything, direct))
        children[name] = [below for below in direct if below not in indirect]
    return children


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Fingerprint -> name: stage, method and round; seed and set where the rows differ in them."""
    several = {key: len({row[key] for row in rows} - {None}) > 1 for key in ("seed", "set")}
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row["fingerprint"], set()).add(row["method"])
    names = {}
    for row in rows:
        parts = [row["stage"]]
        if len(methods[row["fingerprint"]]) == 1:  # else they share it
            parts.append(row["method"])
        if row["round"] is not None and row["method"] != ZERO_SHOT:
            parts.append(str(row["round"]))
        parts.append(row["set"] if several["set"] else "")
        parts.append(f"seed {row['seed']}" if several["seed"] and row["seed"] is not None else "")
        names[row["fingerprint"]] = " ".join(filter(None, parts))
    return names


def _reasons(why: list[str]) -> list[str]:
    """The reasons, with all changed inputs in one line that names at most SHOWN of them."""
    inputs = [reason.split()[1] for reason in why if reason.startswith("input ")]
    if len(inputs) < 2:
        return why
    rest = [reason for reason in why if not reason.startswith("input ")]
    more = f" and {len(inputs) - SHOWN} more" if len(inputs) > SHOWN else ""
    return [*rest, f"inputs changed: {', '.join(inputs[:SHOWN])}{more}"]


def _facts(row: Row, runs: bool) -> str:
    """The columns of a finished stage; for any other stage, what a run would do with it."""
    if row["state"] == "done":
        count = sum((row["rows"] or {}).values())
        rows = f"{count:,}" if count else ""
        created = _local(row["created"])
        return f"{rows:>11}  {_size(row['bytes']):>8}  {_duration(row['seconds']):>8}  {created}"
    notes = []
    if row["state"] == "partial":
        of, progress = f" of {row['of']:,}" if row.get("of") else "", row.get("progress") or {}
        if progress.get("unit") == "steps":
            notes = [f"{progress['done']:,} of {progress['total']:,} steps"]
            if row.get("held_by") and progress.get("now"):
                notes[0] += f", {progress['now']}"
        elif row["shards"] or of:
            # Evaluate runs several modes: of "evaluate: majority" show "majority".
            _, _, part = progress.get("what", "").partition(": ")
            notes = [f"{part}{': ' if part else ''}{row['shards']:,}{of} shards finished"]
        notes += [f"{_duration(row['seconds'])} spent"] if row.get("seconds") else []
    then = {"partial": "goes on from there", "stale": "makes it anew", "missing": "makes it"}
    if row.get("held_by"):
        notes.append(f"{row['held_by']} is at work on it")
    elif runs:
        notes.append(f"a run {then[row['state']]}")
    else:
        notes.append("a run leaves it: what reads it is there")
    return "; ".join(notes)


def _local(created: str) -> str:
    """A manifest's UTC time in this machine's time zone, to the minute."""
    stamp = timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp))


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
