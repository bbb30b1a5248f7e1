"""One flipped bit anywhere, and artifacts of another version."""

import random
import shutil
from pathlib import Path

from tests.chaos import world
from tests.chaos.figures import Figure


def flips(root: Path, long: bool) -> list[Figure]:
    """One bit in any file of any artifact: verify finds it."""
    world.enter(root)
    made = world.stages()
    names = list(made) if long else [name for name in made if name not in world.WITH_MODEL]
    world.preload(made[name] for name in names)
    folders = [stage.folder for stage, _, _ in world.timed([made[name] for name in names])]
    return flip(folders, 1000 if long else 40) + (_train_refuses(made) if long else [])


def flip(folders: list[Path], count: int) -> list[Figure]:
    """Flip `count` bits one after another, in every file of `folders` at least once."""
    from pipeline.cli import verify

    for folder in folders:
        world.make_writable(folder)
    others = {folder.name: folder for folder in folders}
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]
    files = [path for path in files if path.stat().st_size]
    owners = {path: next(f for f in folders if f in path.parents) for path in files}
    sound = sum(len(list(verify.problems(folder, others))) for folder in folders)
    draw = random.Random(1)
    chosen = files + draw.choices(files, k=max(0, count - len(files)))
    found = named = 0
    for path in chosen[:count] if len(files) <= count else draw.sample(files, count):
        place, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes([old[0] ^ bit]))
        problems = list(verify.problems(owners[path], others))
        found += bool(problems)
        named += any(str(path) in problem for problem in problems)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(old)
    return [
        Figure("flips", f"files of {len(folders)} artifacts", len(files)),
        Figure("flips", "problems before any bit was flipped", sound, 0),
        Figure("flips", f"of {count} flipped bits, found by verify", found, count),
        Figure("flips", "and named with their file", named, count),
    ]


def _train_refuses(made: dict) -> list[Figure]:
    """Question shards with one flipped bit, given to Train."""
    from tasks.runtime.errors import StageError
    from training.loop.session import verify

    folder = made["BuildMCQ"].folder
    draw = random.Random(2)
    refused = 0
    for _ in range(100):
        path = draw.choice(sorted(folder.glob("mcq-*.parquet")))
        data = bytearray(path.read_bytes())
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        try:
            verify(folder)
        except StageError:
            refused += 1
        data[place] ^= bit
        path.write_bytes(data)
    return [Figure("flips", "of 100 flipped bits in questions, refused by Train", refused, 100)]


def upgrade(root: Path, long: bool) -> list[Figure]:
    """Old artifacts after an upgrade: made again, or refused with the reason; never misread."""
    import pyarrow.parquet as pq

    from pipeline import tasks
    from pipeline.artifacts import store
    from pipeline.cli import status, verify

    world.enter(root)
    made = world.stages()
    chosen = [made[name] for name in ("Download", "Split", "Propose")]
    list(world.timed(chosen))
    download, split, propose = chosen
    told = []

    tasks.Split.code_version += 1
    world.enter(root)
    newer = world.stages()["Split"]
    row = status.describe(newer)
    ok = row["state"] == "stale" and any("code_version" in why for why in row["why"])
    world.run(newer)
    ok = ok and newer.folder.exists() and newer.folder != split.folder and split.folder.exists()
    told.append(Figure("upgrade", "a raised code_version: stale and why, then made again", int(ok), 1))  # fmt: skip
    tasks.Split.code_version -= 1
    world.enter(root)

    # The same version number, but a column less: somebody forgot to raise it.
    manifest = store.read_manifest(propose.folder)
    world.make_writable(propose.folder)
    older = propose.folder.with_name("older.partial")
    shutil.copytree(propose.folder, older)
    for path in older.glob("rollouts-*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns("completion"), path)
    (older / store.MANIFEST).unlink()
    store.remove(propose.folder)
    store.commit(older, propose.folder, {k: manifest[k] for k in manifest if k not in ("files", "rows")})  # fmt: skip
    problems = verify.check(root / "artifacts", [propose.folder])
    ok = any("completion" in problem and "another version" in problem for problem in problems)
    told.append(Figure("upgrade", "a table without a column: verify names it", int(ok), 1))
    sentence = world.run(world.stages()["BuildMCQ"])
    ok = "completion" in sentence and "another version" in sentence and "Traceback" not in sentence
    if not ok:
        print(f"upgrade: {sentence} {problems}")
    told.append(Figure("upgrade", "and the stage that reads it refuses it, with why", int(ok), 1))

    world.make_writable(download.folder)
    path = download.folder / store.MANIFEST
    path.write_text(path.read_text().replace('"manifest_version": 2', '"manifest_version": 9'))
    sentence = world.run(world.stages()["Download"])
    ok = "newer version of this project" in sentence and "Traceback" not in sentence
    told.append(Figure("upgrade", "a manifest of a newer version: refused with why", int(ok), 1))
    return told
