"""The state of every artifact in a task's graph and the reasons; which artifacts depend on which.

The states are `done`; `partial`: a working folder is there, with the finished shards of a run that
was cut off; `stale`: only an artifact of other settings, inputs or code is there; `missing`.
Nothing heavy is imported. `tree.py` prints the states, `clean.py` handles working folders.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.artifacts import child, source_code, store
from pipeline.stage import Stage, lineage
from tasks.tables.manifest import Manifest

# The parts of a stage's identity that are compared with those of an existing artifact.
DESCRIBED = ("settings", "inputs", "code_version", "card_sha256")


def graph(train: Any) -> list[Stage]:
    """Every stage of a task (TrainDiVE or a single stage), inputs before the stages that read them."""
    stages: dict[str, Stage] = {}
    own = (train.parts() or [train]) if isinstance(train, Stage) else []
    for report in own or train.requires():
        for stage in [*lineage(report), report]:
            stages.setdefault(stage.task_id, stage)
    return list(stages.values())


def describe(stage: Stage) -> dict[str, Any]:
    """One stage's state as JSON values; `why` lists the differences from the existing artifact."""
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
        manifest = store.manifest_of(stage.folder)
        facts |= {key: getattr(manifest, key) for key in ("rows", "seconds", "created")}
        facts["bytes"] = manifest.bytes
        if changed := source_code.changed(manifest, stage.module):
            facts["why"] = [source_code.change_note(changed)]
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
            "why": list(differences(store.manifest_of(current).identity, stage.identity)),
        }
    return facts | {"state": "missing"}


def _finished_shards(partial: Path) -> int:
    """How many shards there are of the table that was written last.

    A stage may write one table after another, or two at a time.
    """
    written = {path: path.stat().st_mtime_ns for path in partial.glob("*-[0-9]*.parquet")}
    if not written:
        return 0
    last = max(written, key=lambda path: (written[path], path))
    return len(list(partial.glob(f"{last.name.rpartition('-')[0]}-*[0-9].parquet")))


def _all_shards(partial: Path) -> int | None:
    """How many shards there will be; None where the child's progress and recipe do not show it."""
    progress = child.progress(partial)
    try:
        recipe = json.loads((partial / store.RECIPE).read_text())
    except (OSError, ValueError):
        return None
    size = progress.get("shard") or recipe.get("shard_size")
    if progress.get("unit") == "shards":
        return progress.get("total")
    return -(-progress["total"] // size) if size and progress.get("total") else None


def differences(recorded: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    """In words, each setting, input, code version or card that differs between two identities."""
    for group in DESCRIBED:
        before, now = recorded.get(group), wanted.get(group)
        if before == now:
            continue
        if not isinstance(before, dict) or not isinstance(now, dict):
            yield f"{group} {_short(before)} -> {_short(now)}"
            continue
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                change = f"{_short(before.get(key))} -> {_short(now.get(key))}"
                yield f"input {key} changed" if group == "inputs" else f"{key} {change}"


def artifacts(root: Path) -> Iterator[Path]:
    """Every committed artifact below `root`."""
    for manifest in sorted(root.rglob(store.MANIFEST)):
        folder = manifest.parent
        unfinished = folder.suffix in (store.PARTIAL, store.DELETED)
        if not folder.is_symlink() and folder.name != "current" and not unfinished:
            yield folder


def garbage(root: Path) -> list[tuple[Path, int]]:
    """(folder, bytes) of each artifact that is not `current`, and that no `current` one depends on."""
    manifests = {folder: store.manifest_of(folder) for folder in artifacts(root)}
    by_fingerprint = {manifest.fingerprint: manifest for manifest in manifests.values()}
    links = [link for link in root.rglob("current") if link.is_symlink() and link.exists()]
    waiting = [store.manifest_of(link).fingerprint for link in links]
    needed: set[str] = set()
    while waiting:
        fingerprint = waiting.pop()
        if fingerprint not in needed:
            needed.add(fingerprint)
            waiting += by_fingerprint.get(fingerprint, Manifest()).inputs.values()
    return [
        (folder, manifest.bytes)
        for folder, manifest in manifests.items()
        if manifest.fingerprint not in needed
    ]


def downstream(root: Path, fingerprint: str) -> list[Path]:
    """The artifacts that were made from the one with this fingerprint, directly or not."""
    manifests = {folder: store.manifest_of(folder) for folder in artifacts(root)}
    below, grown = {fingerprint}, True
    while grown:
        grown = False
        for manifest in manifests.values():
            if manifest.fingerprint not in below and below & set(manifest.inputs.values()):
                below.add(manifest.fingerprint)
                grown = True
    return [f for f, m in manifests.items() if m.fingerprint in below - {fingerprint}]


def compare(one: Path, other: Path) -> list[str]:
    """How two artifacts of a stage differ, one line each: identity, row counts, stats, files."""
    first, second = store.manifest_of(one), store.manifest_of(other)
    if first.stage != second.stage:
        return [f"{first.stage} and {second.stage} are different stages"]
    lines = list(differences(first.identity, second.identity))
    for key in ("rows", "stats"):
        before, now = getattr(first, key), getattr(second, key)
        lines += [
            f"{key} {name}: {_short(before.get(name))} -> {_short(now.get(name))}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
    files = {name: file.sha256 for name, file in first.files.items()}
    others = {name: file.sha256 for name, file in second.files.items()}
    equal = sum(files[name] == others[name] for name in files.keys() & others.keys())
    return [*lines, f"{equal} of {len({*files, *others})} files are the same"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
