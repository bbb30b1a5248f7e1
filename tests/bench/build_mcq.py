"""How fast rollouts become questions, and what the official rules lose on the same rollouts.

    python -m tests.bench.build_mcq --json FILE
    python -m tests.bench.build_mcq --images 5000        # a tenth, for a quick look

Rollouts are synthetic (`tests.bench.synthetic`): 200 bird-like classes, 20 answers an image, some
misspelt, unreadable or no class. Timed is everything from Parquet shards to finished questions in
memory, images stood for by their ids, on one thread; each run has a process of its own, so that
its peak memory is its own. Medians of three runs, interleaved; a tenfold run is done once.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.build_mcq import Builder
from tasks.language import answers
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.language.vocabulary import Vocabulary
from tasks.questions.candidates import merge_images
from tasks.questions.settings import BuildMCQSettings
from tasks.tables import schemas, shards
from tasks.tables.split_table import Rows
from tests.bench import results
from tests.bench.official_rules import Losses, official_rules, spread
from tests.bench.synthetic import BASE, card, rows_of, write_rollouts

ROLLOUTS, REPEATS, SEED, SHARD = 20, 3, 0, 500
RULES = BuildMCQSettings(
    num_options=5,
    min_options=3,
    top_up="confusion",
    vocabulary="closed",
    fuzzy_threshold=0.0,
    fuzzy_margin=5.0,
    options_from="policy",
    answer_from="label",
    min_truth_votes=0,
    max_unparsed_per_image=1.0,
    max_lost_share=1.0,
    shard_size=SHARD,
)
Figure = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--images", type=int, default=50_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = speed(Path(folder), given.images) + losses(Path(folder) / "one", given.images)
    width = max(len(figure["figure"]) for figure in figures)
    for figure in figures:
        value = f"{figure['value']:,}" if isinstance(figure["value"], int) else figure["value"]
        print(f"{figure['figure']:{width}}  {value!s:>12} {figure['unit']:14} {figure['goal']}")
    settings = {"images": given.images, "rollouts": ROLLOUTS, "shard_size": SHARD}
    results.write(given.json, figures, settings)


def speed(folder: Path, images: int) -> list[Figure]:
    """Rate, memory, growth with ten times the rollouts, and what reading each text once saves."""
    one, more = folder / "one", folder / "more"
    write_rollouts(one, images, ROLLOUTS)
    runs: dict[str, list[dict[str, Any]]] = {"one": [], "written": []}
    for _ in range(REPEATS):
        runs["one"].append(_child(one, images, "memory"))
        runs["written"].append(_child(one, images, "disk"))
    seconds = {name: statistics.median(r["seconds"] for r in done) for name, done in runs.items()}
    peak = {name: max(r["peak_mb"] for r in done) for name, done in runs.items()}
    count = images * ROLLOUTS
    write_rollouts(more, images, 10 * ROLLOUTS)
    deeper = _child(more, images, "memory")
    shutil.rmtree(more)
    write_rollouts(more, 10 * images, ROLLOUTS)
    wider = _child(more, 10 * images, "memory")
    shutil.rmtree(more)
    distinct, loop, rows = normalisation(one)
    return [
        _figure("rollouts", count, "-", "rollouts"),
        _figure("rollouts to questions", count / seconds["one"], ">= 300,000", "rollouts/s"),
        _figure(
            "the same, shards written and synced", count / seconds["written"], "-", "rollouts/s"
        ),
        _figure("peak memory", peak["one"], "< 1,024", "MB"),
        _figure(
            "time, 10 x the rollouts an image", deeper["seconds"] / seconds["one"], "<= 11", "x"
        ),
        _figure("memory, 10 x the rollouts an image", deeper["peak_mb"] / peak["one"], "1", "x"),
        _figure("time, 10 x the images", wider["seconds"] / seconds["one"], "<= 11", "x"),
        _figure("memory, 10 x the images", wider["peak_mb"] / peak["one"], "1", "x"),
        _figure("peak memory, 10 x the images", wider["peak_mb"], "< 1,024", "MB"),
        _figure("distinct answers", distinct, "-", f"of {rows:,}"),
        _figure("matching distinct answers against row by row", loop, ">= 5", "x"),
    ]


def normalisation(folder: Path) -> tuple[int, float, int]:
    """(distinct answers, how much longer matching each row takes, rows), on one shard."""
    batch = shards.read_file(shards.paths(folder, "rollouts")[0], ["completion"])
    texts = [t for c in batch["completion"].to_pylist() if (t := answers.parse(c).answer)]
    once, each = ClassNames(card().classes), ClassNames(card().classes)
    started = time.perf_counter()
    by_text = {text: once.match(text) for text in set(texts)}
    at_once = [by_text[text] for text in texts]
    middle = time.perf_counter()
    one_by_one = [each._match(text) for text in texts]  # what remembers nothing
    ended = time.perf_counter()
    assert at_once == one_by_one
    return len(by_text), (ended - middle) / (middle - started), len(texts)


def losses(folder: Path, images: int) -> list[Figure]:
    """The official rules and ours on the same rollouts."""
    names = ClassNames(card().classes)
    said: dict[str, list[str]] = {}
    for path in shards.paths(folder, "rollouts")[:5]:
        for row in shards.read_file(path, ["image_id", "completion"]).to_pylist():
            if answer := answers.parse(row["completion"]).answer:
                said.setdefault(row["image_id"], []).append(answer)
    rows = [row for row in rows_of(images) if row["image_id"] in said]
    truths = {row["image_id"]: row["label"] for row in rows}
    theirs = official_rules(said, truths, names, range(BASE), SEED)
    ours = _ours(folder, rows, names)
    told = (
        ("truth wrongly thought absent", "truth_thought_absent", "images"),
        ("questions with a class twice", "duplicate_options", "questions"),
        ("candidates of the top 5 lost", "lost_candidates", "candidates"),
    )
    figures = []
    for title, key, whole in told:
        for who, side, goal in (("official rules", theirs, "-"), ("ours", ours, "0")):
            share = 100 * getattr(side, key) / max(1, getattr(side, whole))
            figures.append(_figure(f"{title}, {who}", share, goal, f"% of {whole}"))
    for who, side, goal in (("official rules", theirs, "-"), ("ours", ours, "0")):
        figures.append(
            _figure(f"letter imbalance, {who}", 100 * side.letter_spread, goal, "% of questions")
        )
    return figures


def _ours(folder: Path, rows: list[dict[str, Any]], names: ClassNames) -> Losses:
    """The same counts, taken from the questions that BuildMCQ makes."""
    builder = Builder(card(), replace(RULES, shard_size=len(rows)), "brief", SEED)
    (_, asked), *_ = builder.shards(_table(rows), folder, _ids_as_bytes)
    truths = {row["image_id"]: row["label"] for row in rows}
    vocabulary = Vocabulary(names, frozenset(range(BASE)))
    ids = list(truths)
    merged = merge_images(folder, ids, vocabulary, len(ids))
    votes = dict(zip(ids, (v for block in merged for v in block.images()), strict=True))
    found = Losses(images=len(ids), questions=len(asked))
    letters = Counter[tuple[int, int]]()
    for row in asked.to_pylist():
        top = [c.class_id for c in votes[row["image_id"]].candidates]
        shown = set(row["option_class_ids"])
        found.candidates += min(len(top), RULES.num_options)
        # The truth may stand in for the last of a full list; that is the rule and no loss.
        wanted = top[
            : RULES.num_options - (truths[row["image_id"]] not in top[: RULES.num_options])
        ]
        found.lost_candidates += len(set(wanted) - shown)
        found.truth_thought_absent += (
            "truth" in row["option_sources"] and truths[row["image_id"]] in top[: RULES.num_options]
        )
        found.duplicate_options += len(shown) < len(row["option_class_ids"])
        letters[len(row["options"]), LETTERS.index(row["answer_letter"])] += 1
    found.letter_spread = spread(letters)
    return found


def _table(rows: list[dict[str, Any]]) -> Rows:
    return Rows(pa.Table.from_pylist(rows))


def build(folder: Path, images: int, write: bool) -> dict[str, Any]:
    """Build all questions; seconds and peak memory (MB) of this process."""
    rows = _table(rows_of(images))
    builder = Builder(card(), RULES, "brief", SEED)
    schema = schemas.candidates(builder.card.classes)
    gc.freeze()  # as every stage's process does
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        for index, (table, asked) in enumerate(builder.shards(rows, folder, _ids_as_bytes)):
            if write:
                shards.write(shards.shard_path(Path(out), "mcq", index), asked, asked.schema)
                shards.write(shards.shard_path(Path(out), "candidates", index), table, schema)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Of this program alone: getrusage would count what the process was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _child(folder: Path, images: int, where: str) -> dict[str, Any]:
    code = "import sys; from pathlib import Path; from tests.bench.build_mcq import build, json; "
    code += "print(json.dumps(build(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == 'disk')))"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(images), where],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout)


def _ids_as_bytes(image_ids: list[str]) -> dict[str, bytes]:
    return {image_id: image_id.encode() for image_id in image_ids}


def _figure(name: str, value: float, goal: str, unit: str) -> Figure:
    rounded = value if isinstance(value, int) else round(value) if value > 1000 else round(value, 2)
    return {"figure": name, "value": rounded, "goal": goal, "unit": unit}


if __name__ == "__main__":
    main()
