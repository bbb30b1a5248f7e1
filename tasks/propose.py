"""Propose: samples N rollouts per training image from a policy, and writes them raw to Parquet.

    python -m tasks.propose recipe.json

This stage needs a GPU, so it only generates: it stores each completion as it came, shard by shard,
and a killed run goes on after its last finished shard. BuildMCQ interprets the answers, without a
GPU. The figures beside the progress bar (unparsed share, Pass@1 and Pass@N) show a bad prompt early.
"""

from pathlib import Path

from data_cards import load
from tasks.engines import policies, refusals
from tasks.engines.sampler import RolloutStatistics, Sampler, throughput
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import SameQuestion
from tasks.language import prompts
from tasks.language.class_names import ClassNames
from tasks.questions import refresh
from tasks.questions.instalments import AllNameTheTruth
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

    With `instalments`, an image gets fewer when all of its answers up to there name the truth:
    BuildMCQ would most likely skip it, as an image without a wrong candidate.

    In a later round, `previous` (its proposals) and `train` are artifacts of the round before, from
    which `tasks.questions.refresh` chooses the images to ask about again. Writes
    `rollouts-*.parquet` (up to num_rollouts rows an image, in image order), `stats.json` and, where the
    engine refused images, `rollouts_refused.parquet`; a refused image has empty rollouts.

    Raises StageError when more than `max_unparsed_share` of the answers are unparsed (more than
    `fail_fast_unparsed_share` after the first two shards), since questions built from them would be
    noise, and when the engine refuses more than `max_lost_share` of the images.
    """
    data_card = load(card)
    policies.check_words(policies.special_tokens(policy), data_card)
    rows = split_table.select(split, "train", ("base",))[: settings.limit or None]
    names = [data_card.classes[label] for label in rows.classes]
    before, text = prompts.card_question(
        data_card,
        settings.prompt,
        names,
        style=engine.prompt_style,
        list_position=engine.list_position,
    )
    plan = refresh.plan(rows.ids, settings, previous=previous, train=train, seed=seed)
    table = "fresh" if plan.kept else "rollouts"
    queries = SameQuestion(plan.asked, text, before)
    labels = rows.labels
    statistics = RolloutStatistics(labels, data_card, settings.fail_fast_unparsed_share)
    n, enough = settings.num_rollouts, None
    if settings.counts:
        classes = ClassNames.of(data_card)
        enough = AllNameTheTruth(settings.counts, labels, classes)
    with Sampler(policy, engine, n, seed) as sampler:
        sampler.run(
            output,
            table,
            queries,
            download,
            settings.shard_size,
            "propose",
            statistics=statistics,
            enough=enough,
        )
        stats = throughput(statistics.values(), sampler)
    stats |= {"kept": len(plan.kept), "retired": len(plan.retired)}
    if enough:
        stats["saved"] = n * len(plan.asked) - stats["rollouts"]
    if stats["refused"] > settings.max_lost_share * len(rows):
        raise StageError(
            f"the engine refused {stats['refused']} of {len(rows)} images (more than [Propose] "
            f"max_lost_share = {settings.max_lost_share:g}): {refusals.first(output, table)}"
        )
    if stats["unparsed"] > settings.max_unparsed_share * stats["rollouts"]:
        raise StageError(
            f"{stats['unparsed']} of {stats['rollouts']} answers cannot be read (more than "
            f"[Propose] max_unparsed_share = {settings.max_unparsed_share:g}); the first one is "
            f"{stats['example_unparsed']!r}; look at the rollouts in {output}"
        )
    if plan.kept and previous is not None:
        refresh.merge(output, table, previous, plan, rows.ids, settings.shard_size)
    refresh.write_retired(output, plan)
    save_stats(output, stats)
    summary = [
        f"{stats['rollouts']} rollouts of {len(plan.asked)} images",
        f"Pass@1 {stats['pass_at_1']:.3f}",
        f"Pass@{settings.num_rollouts} {stats['pass_at_n']:.3f}",
        f"{stats['unparsed']} unparsed",
        f"{stats['refused']} refused",
    ]
    if enough:
        summary.append(f"{stats['saved']} rollouts saved by instalments")
    if settings.refresh != "all" and previous is not None:
        summary.append(
            f"{stats['kept']} images keep their rollouts, {stats['retired']} are retired"
        )
    print(f"propose: {', '.join(summary)}")


if __name__ == "__main__":
    main(propose)
