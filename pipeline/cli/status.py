"""The state of every artifact in a task's graph, and why; which artifacts rest on which.

States: `done`; `partial`, a killed run's finished shards are there; `stale`, another version of it
is, made with other settings, inputs or code; `missing`. Nothing heavy is imported. `tree.py` shows
it, `clean.py` sweeps up.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts import child, source_code, store
from pipeline.stage import Stage, lineage

# What of a stage's identity is compared with the version that is there.
DESCRIBED = ("settings", "inputs", "code_version", "card_sha256")


def graph(train: Any) -> list[Stage]:
    """Every stage of a task, TrainDiVE or one of its stages, inputs before what reads them."""
    found: dict[str, Stage] = {}
    own = (train.parts() or [train]) if isinstance(train, Stage) else []
    for report in own or train.requires():
        for stage in [*lineage(report), report]:
            found.setdefault(stage.task_id, stage)
    return list(found.values())


def describe(stage: Stage) -> dict[str, Any]:
    """One stage's state, as plain values; `why` names what differs from the version that is there."""
    facts: dict[str, Any] = {
        "stage": stage.task_family,
        "round": getattr(stage, "refresh_round", None),
        "method": getattr(stage, "method", ""),
        "set": getattr(stage, "set_name", stage.dataset) if stage.of_a_set else None,
        "seed": getattr(stage, "seed", None) if stage.of_a_set else None,
        "fingerprint": stage.fingerprint,
        "requires": [needed.fingerprint for needed in stage.needed.values()],
        "folder": str(stage.folder),
        "why": [],
    }
    partial = store.partial_of(stage.folder)
    if stage.folder.is_dir():
        manifest = store.read_manifest(stage.folder)
        facts |= {key: manifest.get(key) for key in ("rows", "seconds", "created")}
        facts["bytes"] = sum(f["bytes"] for f in manifest.get("files", {}).values())
        if changed := source_code.changed(manifest, stage.module):
            facts["why"] = [source_code.told(changed)]
        return facts | {"state": "done"}
    if partial.is_dir():
        facts["shards"] = _finished_shards(partial)
        facts |= {"of": _all_shards(partial), "progress": child.progress(partial)}
        facts |= {
            "seconds": store.spent(partial),
            "held_by": store.worked_on_by(stage.folder),
        }
        return facts | {"state": "partial"}
    current = stage.folder.parent / "current"
    if current.exists():
        return facts | {
            "state": "stale",
            "why": list(differences(store.read_manifest(current), stage.identity)),
        }
    return facts | {"state": "missing"}


def _finished_shards(partial: Path) -> int:
    """Shards of the table that was written last: a stage may write two at a time, or one by one."""
    written = {path: path.stat().st_mtime_ns for path in partial.glob("*-[0-9]*.parquet")}
    if not written:
        return 0
    last = max(written, key=lambda path: (written[path], path))
    return len(list(partial.glob(f"{last.name.rpartition('-')[0]}-[0-9]*.parquet")))


def _all_shards(partial: Path) -> int | None:
    """How many shards there will be, where the child's progress and its recipe tell."""
    told = child.progress(partial)
    try:
        recipe = json.loads((partial / store.RECIPE).read_text())
    except (OSError, ValueError):
        return None
    size = told.get("shard") or recipe.get("shard_size")
    if told.get("unit") == "shards":
        return told.get("total")
    return -(-told["total"] // size) if size and told.get("total") else None


def differences(made: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """What of `wanted` is not as it was `made`: settings by name, inputs, code version, card."""
    for group in DESCRIBED:
        before, now = made.get(group), wanted.get(group)
        if before == now:
            continue
        if not isinstance(before, dict) or not isinstance(now, dict):
            yield f"{group} {_short(before)} -> {_short(now)}"
            continue
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                told = f"{_short(before.get(key))} -> {_short(now.get(key))}"
                yield f"input {key} changed" if group == "inputs" else f"{key} {told}"


def artifacts(root: Path) -> Iterator[Path]:
    """Every committed artifact below `root`."""
    for manifest in sorted(root.rglob(store.MANIFEST)):
        folder = manifest.parent
        unfinished = folder.suffix in (store.PARTIAL, store.DELETED)
        if not folder.is_symlink() and folder.name != "current" and not unfinished:
            yield folder


def garbage(root: Path) -> list[tuple[Path, int]]:
    """(folder, bytes) of the artifacts that no `current` one is, or was made from."""
    found = {folder: store.read_manifest(folder) for folder in artifacts(root)}
    by_fingerprint = {manifest["fingerprint"]: manifest for manifest in found.values()}
    links = [link for link in root.rglob("current") if link.is_symlink() and link.exists()]
    waiting = [store.read_manifest(link)["fingerprint"] for link in links]
    needed: set[str] = set()
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint not in needed:
            needed.add(fingerprint)
            waiting += by_fingerprint.get(fingerprint, {}).get("inputs", {}).values()
    return [
        (folder, sum(file["bytes"] for file in manifest["files"].values()))
        for folder, manifest in found.items()
        if manifest["fingerprint"] not in needed
    ]


def downstream(root: Path, fingerprint: str) -> list[Path]:
    """The artifacts that were made from it, directly or not."""
    found = {folder: store.read_manifest(folder) for folder in artifacts(root)}
    below, grown = {fingerprint}, True
    while grown:
        grown = False
        for manifest in found.values():
            if manifest["fingerprint"] not in below and below & set(manifest["inputs"].values()):
                below.add(manifest["fingerprint"])
                grown = True
    return [f for f, m in found.items() if m["fingerprint"] in below - {fingerprint}]


def compare(one: Path, other: Path) -> list[str]:
    """What two artifacts of a stage differ in: recipe, rows, files."""
    first, second = store.read_manifest(one), store.read_manifest(other)
    if first["stage"] != second["stage"]:
        return [f"{first['stage']} and {second['stage']} are different stages"]
    told = list(differences(first, second))
    for key in ("rows", "stats"):
        before, now = first.get(key, {}), second.get(key, {})
        told += [
            f"{key} {name}: {_short(before.get(name))} -> {_short(now.get(name))}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
    files = {name: facts["sha256"] for name, facts in first["files"].items()}
    others = {name: facts["sha256"] for name, facts in second["files"].items()}
    equal = sum(files[name] == others[name] for name in files.keys() & others.keys())
    return [*told, f"{equal} of {len({*files, *others})} files are the same"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
