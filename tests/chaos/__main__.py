"""python -m tests.chaos [--long] [--json FILE] [FAULT ...]: one table of fault x figure."""

import argparse
import difflib
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import results
from tests.chaos import figures, world
from tests.chaos.faults import FAULTS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Do faults to the line on purpose, and count what comes of it.",
        epilog="faults: " + "; ".join(_told(name) for name in FAULTS),
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="default: all of them")
    parser.add_argument("--long", action="store_true", help="in full, which takes an hour or more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    parser.add_argument("--folder", type=Path, help="where to do it; default: a temporary folder")
    parser.add_argument("--stages", nargs="*", default=(), help="of kills: these stages only")
    given = parser.parse_args()
    for name in given.faults:
        if name not in FAULTS:
            close = difflib.get_close_matches(name, FAULTS, 1) or [", ".join(FAULTS)]
            sys.exit(f"error: no fault {name!r}; did you mean {close[0]}?")
    out = given.json.absolute() if given.json else None
    home = os.getcwd()
    found: list[figures.Figure] = []
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=given.folder) as folder:
        for name in given.faults or FAULTS:
            started = time.monotonic()
            more = {"only": tuple(given.stages)} if name == "kills" else {}
            told = FAULTS[name](Path(folder).resolve() / name, given.long, **more)
            told.append(figures.Figure(name, "seconds", round(time.monotonic() - started, 1)))
            os.chdir(home)
            print(figures.table(told), flush=True)
            found += told
        world.make_writable(Path(folder))
    results.write(out, [each.row() for each in found], {"long": given.long})
    sys.exit(0 if all(each.met for each in found) else 1)


def _told(name: str) -> str:
    return f"{name}: {(FAULTS[name].__doc__ or '').splitlines()[0]}"


if __name__ == "__main__":
    main()
