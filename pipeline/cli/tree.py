"""The graph as a tree for a terminal: a task, below it what it requires, and the state of each.

An input that comes by way of another one is not repeated under what reads both; a stage that several
others read is written out once, and afterwards told as `(above)`.
"""

import textwrap
import time
from calendar import timegm
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 118  # columns, of lines that can be wrapped
SHOWN = 6  # names of changed inputs
BRANCHES = ("├─ ", "└─ ", "│  ", "   ")  # a child, the last one, and what stands below each
BRANCHES_ASCII = ("|- ", "`- ", "|  ", "   ")

Row = dict[str, Any]  # of `status.describe`


def would_run(rows: Sequence[Row]) -> set[str]:
    """Fingerprints of the stages that a run would do: what is complete is not looked beyond."""
    by_name = {row["fingerprint"]: row for row in rows}
    below = _requires(by_name)
    found: set[str] = set()
    waiting = roots(rows)
    while waiting:
        name = waiting.pop()
        if by_name[name]["state"] != "done" and name not in found:
            found.add(name)
            waiting += below[name]
    return found


def _requires(by_name: dict[str, Row]) -> dict[str, list[str]]:
    """What each stage requires of the others that are shown."""
    return {
        name: [below for below in dict.fromkeys(row["requires"]) if below in by_name]
        for name, row in by_name.items()
    }


def roots(rows: Sequence[Row]) -> list[str]:
    """Fingerprints of the stages that none of the others requires."""
    required = {name for row in rows for name in row["requires"]}
    return [name for name in dict.fromkeys(row["fingerprint"] for row in rows) if name not in required]  # fmt: skip


def lines(rows: Sequence[Row], title: str = "", ascii_only: bool = False) -> list[str]:
    """The tree with its columns, and what a run would do.

    `rows` are those of `status.describe`. Of several roots, or of one that is no stage itself,
    `title` stands above them.
    """
    by_name = {row["fingerprint"]: row for row in rows}
    branches = BRANCHES_ASCII if ascii_only else BRANCHES
    names, todo = _names(rows), would_run(rows)
    tree = list(_walk(_children(by_name), roots(rows), branches, hangs=bool(title)))
    width = max([len(title), *(len(guide) + len(names[name]) for guide, _, name, _ in tree)])
    told = [f"{title:{width}}  {'state':7}  {'rows':>11}  {'size':>8}  {'took':>8}  made"]
    for guide, below, name, again in tree:
        label = f"{guide}{names[name]}"
        if again:
            told.append(f"{label} (above)")
            continue
        row = by_name[name]
        told.append(f"{label:{width}}  {row['state']:7}  {_facts(row, name in todo)}".rstrip())
        for why in _reasons(row["why"]):
            place = f"{below:{width}}    "
            told += textwrap.wrap(
                why, WIDTH, initial_indent=place, subsequent_indent=f"{place}  ",
                break_long_words=False,
            )  # fmt: skip
    return [*told, "", f"a run would do {len(todo)} of {len(by_name)} stages"]


def _walk(
    children: dict[str, list[str]], chosen: list[str], branches: Sequence[str], hangs: bool
) -> Iterator[tuple[str, str, str, bool]]:
    """(what stands before it, what stands before lines below it, stage, whether it was told before).

    `hangs`: the chosen roots are drawn as children of a line above them.
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

    yield from visit(chosen, "", hangs)


def _children(by_name: dict[str, Row]) -> dict[str, list[str]]:
    """What each stage requires, less what it has by way of another of them."""
    requires = _requires(by_name)
    reach: dict[str, set[str]] = {}

    def everything(name: str) -> set[str]:
        if name not in reach:
            reach[name] = set(requires[name]).union(*map(everything, requires[name]))
        return reach[name]

    found = {}
    for name, direct in requires.items():
        indirect = set().union(*map(everything, direct))
        found[name] = [below for below in direct if below not in indirect]
    return found


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """What a stage is called here: with its method and round, seed and set where they differ."""
    several = {key: len({row[key] for row in rows} - {None}) > 1 for key in ("seed", "set")}
    methods: dict[str, set[str]] = {}
    for row in rows:
        methods.setdefault(row["fingerprint"], set()).add(row["method"])
    found = {}
    for row in rows:
        parts = [row["stage"]]
        if len(methods[row["fingerprint"]]) == 1:  # else they share it
            parts.append(row["method"])
        if row["round"] is not None and row["method"] != "zero_shot":
            parts.append(str(row["round"]))
        parts.append(row["set"] if several["set"] else "")
        parts.append(f"seed {row['seed']}" if several["seed"] and row["seed"] is not None else "")
        found[row["fingerprint"]] = " ".join(filter(None, parts))
    return found


def _reasons(why: list[str]) -> list[str]:
    """Changed inputs in one line, and not all of dozens."""
    inputs = [told.split()[1] for told in why if told.startswith("input ")]
    if len(inputs) < 2:
        return why
    rest = [told for told in why if not told.startswith("input ")]
    more = f" and {len(inputs) - SHOWN} more" if len(inputs) > SHOWN else ""
    return [*rest, f"inputs changed: {', '.join(inputs[:SHOWN])}{more}"]


def _facts(row: Row, runs: bool) -> str:
    """The columns of a finished stage; of any other what a run would do with it."""
    if row["state"] == "done":
        count = sum((row["rows"] or {}).values())
        rows = f"{count:,}" if count else ""
        made = _local(row["created"])
        return f"{rows:>11}  {_size(row['bytes']):>8}  {_duration(row['seconds']):>8}  {made}"
    told = []
    if row["state"] == "partial":
        of, progress = f" of {row['of']:,}" if row.get("of") else "", row.get("progress") or {}
        if progress.get("unit") == "steps":
            told = [f"{progress['done']:,} of {progress['total']:,} steps"]
            if row.get("held_by") and progress.get("now"):
                told[0] += f", {progress['now']}"
        elif row["shards"] or of:
            # Of "evaluate: majority", one of four parts, what stands behind the colon.
            _, _, part = progress.get("what", "").partition(": ")
            told = [f"{part}{': ' if part else ''}{row['shards']:,}{of} shards finished"]
        told += [f"{_duration(row['seconds'])} spent"] if row.get("seconds") else []
    then = {"partial": "goes on from there", "stale": "makes it anew", "missing": "makes it"}
    if row.get("held_by"):
        told.append(f"{row['held_by']} is at work on it")
    elif runs:
        told.append(f"a run {then[row['state']]}")
    else:
        told.append("a run leaves it: what reads it is there")
    return "; ".join(told)


def _local(created: str) -> str:
    """A manifest's UTC time in this machine's zone, to the minute."""
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
