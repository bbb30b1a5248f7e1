"""Power loss: what is on disk in which order, from a trace of the system calls."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.chaos import world
from tests.chaos.figures import Figure

CALLS = "openat,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,link,unlink"
BUILD = """
import sys
from pathlib import Path
from luigi import configuration
from pipeline import tasks
for name in sys.argv[1:]:
    getattr(tasks, name)(dataset="few").run()
"""


def power(root: Path, long: bool) -> list[Figure]:
    """Every name that says "complete" follows the bytes it speaks of to the disk."""
    if shutil.which("strace") is None:
        return [Figure("power", "skipped: strace is not here (apt-get install strace)", 1)]
    world.enter(root)
    made = world.stages()
    traced = ("Download", "Split", "Propose", "BuildMCQ")[: None if long else 2]
    command = ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-o", "trace.txt"]
    command += [sys.executable, "-c", BUILD, *traced]
    subprocess.run(command, check=True, capture_output=True)
    events = list(_events(Path("trace.txt").read_text(errors="replace")))
    told = []
    unsynced_shards = unsynced_names = shards = 0
    for number, (call, path, target) in enumerate(events):
        if (
            call == "rename"
            and target.endswith((".parquet", ".json"))
            and ".progress" not in target
        ):
            shards += 1
            unsynced_shards += not _on_disk(events[:number], path)
            unsynced_names += not _synced_after(
                _until_next_name(events[number + 1 :]), str(Path(target).parent)
            )
    late = unfrozen = unnamed = 0
    for name in traced:
        folder = str(made[name].folder)
        commit = next(i for i, e in enumerate(events) if e[0] == "rename" and e[2] == folder)
        before = events[:commit]
        files = [p for p in made[name].folder.rglob("*") if p.is_file()]
        for file in files:
            written = str(file).replace(folder, f"{folder}.partial")
            unfrozen += not _on_disk(before, written)
        unfrozen += not _synced_after(
            _since_last_name(before, f"{folder}.partial"), f"{folder}.partial"
        )
        manifest = _last(before, "write", f"{folder}.partial/manifest.json")
        others = [_last(before, "write", str(f).replace(folder, f"{folder}.partial")) for f in files
                  if f.name not in ("manifest.json", "run.log")]  # fmt: skip
        late += any(place > manifest for place in others)
        unnamed += not _synced_after(events[commit + 1 :], str(Path(folder).parent))
    told += [
        Figure("power", f"of {shards} files that got their name, not on disk before", unsynced_shards, 0),
        Figure("power", "whose name was not on disk before the next got its own", unsynced_names, 0),
        Figure("power", f"files of {len(traced)} artifacts not on disk before the artifact's name", unfrozen, 0),
        Figure("power", "artifacts with files written after their manifest", late, 0),
        Figure("power", "artifacts whose name was not put on disk", unnamed, 0),
    ]  # fmt: skip
    return told


def _events(trace: str):
    """(call, path, target) of every call that ended well: write and fsync by the file's path."""
    pending: dict[str, str] = {}
    for line in trace.splitlines():
        process, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            pending[process] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = pending.pop(process, "") + resumed[1]
        if " = -1 " in rest:
            continue
        if found := re.match(r"(p?write\w*|fsync|fdatasync)\(\d+<(.*?)>", rest):
            yield "write" if "write" in found[1] else "sync", _path(found[2]), ""
        elif found := re.match(
            r'rename\w*\((?:AT_FDCWD\S*, )?"(.*?)", (?:AT_FDCWD\S*, )?"(.*?)"', rest
        ):
            yield "rename", _path(found[1]), _path(found[2])
        elif found := re.match(r'openat\(.*?, "(.*?)", .*(O_TRUNC|O_CREAT)', rest):
            yield "write", _path(found[1]), ""


def _path(text: str) -> str:
    path = (
        text.encode().decode("unicode_escape").encode("latin-1", "replace").decode(errors="replace")
    )
    return str(Path(path).absolute())


def _last(events: list, call: str, path: str) -> int:
    return max(
        (i for i, e in enumerate(events) if e[0] == call and path in (e[1], e[2])), default=-1
    )


def _on_disk(events: list, path: str) -> bool:
    """Whether a file's last write, under this name or the one it was renamed from, was synced."""
    names = {path} | {e[1] for e in events if e[0] == "rename" and e[2] == path}
    written = max(
        (i for i, e in enumerate(events) if e[0] == "write" and e[1] in names), default=-1
    )
    synced = max((i for i, e in enumerate(events) if e[0] == "sync" and e[1] in names), default=-1)
    return synced > written


def _since_last_name(events: list, folder: str) -> list:
    """The events since a file of the folder last got its name."""
    last = max((i for i, e in enumerate(events)
                if e[0] == "rename" and str(Path(e[2]).parent) == folder), default=-1)  # fmt: skip
    return events[last + 1 :]


def _until_next_name(events: list) -> list:
    """The events before anything else gets its name, and so may rest on what came before."""
    following = (i for i, e in enumerate(events) if e[0] == "rename" and ".progress" not in e[2])
    return events[: next(following, len(events))]


def _synced_after(events: list, folder: str) -> bool:
    return any(call == "sync" and path == folder for call, path, _ in events)
