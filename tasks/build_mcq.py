"""BuildMCQ: turns rollouts into multiple-choice questions, in frozen shards.

    python -m tasks.build_mcq recipe.json

The same rollouts and settings give the same bytes. `tasks.questions.builder` does the work; two-step
inference merges votes with the same functions. `tasks.exchange` imports rollouts of other programs,
and exports questions to other trainers.
"""

from functools import partial
from pathlib import Path

import pyarrow as pa

from data_cards import load
from tasks.questions.builder import Builder
from tasks.questions.refresh import retired
from tasks.questions.settings import BuildMCQSettings
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.progress import progress
from tasks.runtime.protocol import save_stats
from tasks.tables import schemas, shards, split_table


def build_mcq(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    propose: Path,
    prompt_style: str,
    seed: int,
    settings: BuildMCQSettings,
) -> None:
    """Write `candidates-*.parquet`, `mcq-*.parquet` and `stats.json`.

    Every train image has one row among the candidates, skipped images included. `outcome` is kept or
    the reason for skipping: no_candidates (nothing readable was proposed), too_many_unparsed (a
    larger share than `max_unparsed_per_image`), no_label, truth_only (the truth is the only
    candidate), truth_rarely_proposed (by fewer than `min_truth_votes`), too_few_options, or
    duplicate_image (the same bytes already gave a question). Images that a refresh retired have no
    row and are counted.

    Raises StageError when the share of no_candidates exceeds `max_lost_share`, when no image gives a
    question, or when rollouts are missing.
    """
    builder = Builder(load(card), settings, prompt_style, seed)
    gone = retired(propose)
    rows = split_table.select(split, "train", ("base",)).without(gone)
    bar = partial(
        progress, desc="build_mcq", total=-(-len(rows) // settings.shard_size), unit="shards"
    )
    finished = partial(_finished, output, builder.schema)
    images, repeated = shards.ImageStore(download).read, shards.repeated_bytes(download)
    built = builder.shards(rows, propose, images, finished, repeated)
    schema = schemas.candidates(builder.card.classes)
    with shard_by_shard():
        for index, (table, questions) in enumerate(bar(built)):
            if not shards.shard_path(output, "candidates", index).exists():
                shards.write(shards.shard_path(output, "mcq", index), questions, questions.schema)
                # Written last: it shows that the shard's questions are complete.
                shards.write(shards.shard_path(output, "candidates", index), table, schema)
            stop_if_asked()
    stats = builder.stats
    outcomes = stats["outcomes"]
    if outcomes.get("no_candidates", 0) > settings.max_lost_share * len(rows):
        raise StageError(
            f"{outcomes['no_candidates']} of {len(rows)} images have no readable candidate (more "
            f"than [BuildMCQ] max_lost_share = {settings.max_lost_share:g}); look at the rollouts in {propose}"
        )
    if not outcomes.get("kept"):
        raise StageError(f"no image gave a question ({outcomes}); see {output}/candidates-*")
    if gone:  # solved in an earlier round, and listed in Propose's retired.parquet
        outcomes["retired"] = len(gone)
    save_stats(output, stats)
    print(
        f"build_mcq: {outcomes['kept']} questions from {len(rows)} images, truth injected into "
        f"{stats['injected']}; " + ", ".join(f"{n} {o}" for o, n in sorted(outcomes.items()))
    )


def _finished(output: Path, schema: pa.Schema, index: int) -> tuple[pa.Table, pa.Table] | None:
    """The candidates and questions of a shard that an earlier run has written; None without one."""
    path, asked = (shards.shard_path(output, name, index) for name in ("candidates", "mcq"))
    if not path.exists():
        return None
    written = [shards.read_file(part) for part in shards.parts(asked)] if asked.exists() else []
    return shards.read_file(path), pa.concat_tables(written) if written else schema.empty_table()


if __name__ == "__main__":
    main(build_mcq)
