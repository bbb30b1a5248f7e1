"""Propose: N rollouts per training image from a policy, raw, into Parquet.

    python -m tasks.propose CONFIG.json

The expensive stage, so nothing is interpreted here: each completion is stored as it came, shard by
shard, and a killed run goes on from its last finished shard. What the answers mean is BuildMCQ's
business and can be changed without a GPU. Figures on the way (unparsed share, Pass@1 and Pass@N)
only tell early that a prompt is bad.
"""

from pathlib import Path

from data_cards import load
from tasks.engines.sampler import Sampler, Tally, refused_first, throughput
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Ask
from tasks.language import prompts
from tasks.questions import refresh
from tasks.questions.settings import ProposeSettings
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.protocol import save_stats
from tasks.tables import split_table


def propose(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    policy: Path,
    engine: EngineSettings,
    settings: ProposeSettings,
    seed: int,
    previous: Path | None = None,
    train: Path | None = None,
) -> None:
    """Sample `num_rollouts` answers for every base-class train image, or for the first `limit`.

    After training, `previous` and `train` of the round before let `refresh` choose the images that
    are asked about again (`tasks.questions.refresh`). Writes `rollouts-*.parquet` (num_rollouts rows
    an image, in image order), `stats.json` and, where the engine refused images,
    `rollouts_refused.parquet`; a refused image has empty rollouts.
    Raises StageError when more than `max_unparsed_share` of the answers cannot be read, since
    questions built from them would be made of noise (more than `fail_fast_unparsed_share` after
    the first two shards), or when more than `max_lost_share` of the images are refused.
    """
    data_card = load(card)
    rows = split_table.select(split, "train", ("base",))[: settings.limit or None]
    names = [data_card.classes[label] for label in sorted({row["label"] for row in rows})]
    before, text = prompts.card_question(
        data_card,
        settings.prompt,
        names,
        style=engine.prompt_style,
        list_position=engine.list_position,
    )
    order = [row["image_id"] for row in rows]
    chosen = refresh.plan(order, settings, previous=previous, train=train, seed=seed)
    table = "fresh" if chosen.kept else "rollouts"
    asks = [Ask(image_id, text, before) for image_id in chosen.asked]
    labels = {row["image_id"]: row["label"] for row in rows}
    tally = Tally(labels, data_card, settings.fail_fast_unparsed_share)
    with Sampler(policy, engine, settings.num_rollouts, seed) as sampler:
        sampler.run(output, table, asks, download, settings.shard_size, "propose", tally=tally)
        stats = throughput(tally.stats(), sampler)
    stats |= {"kept": len(chosen.kept), "retired": len(chosen.retired)}
    if stats["refused"] > settings.max_lost_share * len(rows):
        raise StageError(
            f"the engine refused {stats['refused']} of {len(rows)} images (more than [Propose] "
            f"max_lost_share = {settings.max_lost_share:g}): {refused_first(output, table)}"
        )
    if stats["unparsed"] > settings.max_unparsed_share * stats["rollouts"]:
        raise StageError(
            f"{stats['unparsed']} of {stats['rollouts']} answers cannot be read (more than "
            f"[Propose] max_unparsed_share = {settings.max_unparsed_share:g}); the first one is "
            f"{stats['example_unparsed']!r}; look at the rollouts in {output}"
        )
    if chosen.kept and previous is not None:
        refresh.merge(output, table, previous, chosen, order, settings.shard_size)
    refresh.write_retired(output, chosen)
    save_stats(output, stats)
    told = [
        f"{stats['rollouts']} rollouts of {len(chosen.asked)} images",
        f"Pass@1 {stats['pass_at_1']:.3f}",
        f"Pass@{settings.num_rollouts} {stats['pass_at_n']:.3f}",
        f"{stats['unparsed']} unparsed",
        f"{stats['refused']} refused",
    ]
    if settings.refresh != "all" and previous is not None:
        told.append(f"{stats['kept']} images keep their rollouts, {stats['retired']} are retired")
    print(f"propose: {', '.join(told)}")


if __name__ == "__main__":
    main(propose)
