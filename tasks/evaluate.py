"""Evaluate: asks a policy about base and novel test images, in every mode of inference.

    python -m tasks.evaluate recipe.json

`tasks/evaluation/modes.py` defines the modes, and how their answers are read. Candidates and questions
are made by BuildMCQ's own functions. Every test image counts in every mode: an answer that cannot be
read counts as wrong, and its status says why.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card, load
from tasks.engines import policies
from tasks.engines.sampler import RolloutStatistics, Sampler, throughput
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Query
from tasks.evaluation import adaptive, cost, tuning
from tasks.evaluation.metrics import pass_at_k
from tasks.evaluation.modes import (
    OF_QUESTIONS,
    Reading,
    choice_queries,
    injected_options,
    letter_of,
    option_names,
    proposed_options,
    read_choice,
    read_majority,
    read_open,
    vote_share,
)
from tasks.evaluation.settings import EvaluateSettings
from tasks.language import prompts
from tasks.language.class_names import ClassNames
from tasks.language.taxonomy import Taxonomy
from tasks.questions.candidates import Votes, merge_all
from tasks.questions.options import Option
from tasks.runtime.command import main
from tasks.runtime.protocol import save_stats
from tasks.tables import schemas, shards, split_table
from tasks.tables.schemas import GROUPS
from tasks.tables.split_table import Row


def evaluate(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    policy: Path,
    engine: EngineSettings,
    settings: EvaluateSettings,
    seed: int,
) -> None:
    """Ask the policy about every image of the part that is set, base and novel.

    With a `limit`, only the first `limit` images of each group.

    Writes the raw answers of every mode that asks (`one_step-*`, `two_step-*`, ...) and the sampled
    `rollouts-*`, `predictions.parquet` (one row per image and mode) and `pass_at_k.json` (unbiased
    Pass@1..N per group). With one_step alone nothing is sampled. The mode adaptive writes
    `thresholds.json` and `adaptive_counts.parquet`; where no other mode samples, it samples in instalments,
    and there is no Pass@k. Raises StageError when the engine cannot do what a mode asks for.
    """
    modes = settings.mode_names
    data_card = load(card)
    policy = policies.local(policy, engine.backend)
    policies.check_words(policies.special_tokens(policy), data_card)
    names = ClassNames.of(data_card)
    taxonomy = Taxonomy.of(data_card)
    rows: Sequence[Row] = split_table.select_parts(split, settings.parts)
    if limit := settings.limit:
        rows = [row for g in GROUPS for row in [r for r in rows if r["group"] == g][:limit]]
    labels = {row["image_id"]: row["label"] for row in rows}
    allowed = {group: _allowed(rows, group, settings.prompt, data_card) for group in GROUPS}
    listed = {g: [data_card.classes[i] for i in sorted(allowed[g])] for g in GROUPS}
    queries = _queries(rows, listed, data_card, engine, settings.prompt)
    statistics = RolloutStatistics(labels, data_card)
    source = (download, settings.shard_size)
    votes: dict[str, dict[str, Votes]] = defaultdict(dict)  # by mode and image
    options: dict[str, dict[str, list[Option]]] = {}
    n = settings.num_rollouts
    adapts = "adaptive" in modes
    in_full = any(mode not in ("one_step", "adaptive") for mode in modes)
    sampled = in_full or adapts
    val = tuning.val_rows(split, limit) if adapts else []
    enough = None
    with Sampler(policy, engine, n, seed) as sampler:
        if adapts:
            thresholds = tuning.tune(
                output,
                sampler,
                _queries(val, listed, data_card, engine, settings.prompt),
                source,
                {row["image_id"]: row["label"] for row in val},
                allowed["base"],
                data_card,
                engine.prompt_style,
                settings,
                seed,
            )
            classes = {row["image_id"]: frozenset(allowed[row["group"]]) for row in rows}
            enough = adaptive.Settled(settings.counts, n, thresholds, names, classes)
        if sampled:
            desc = f"evaluate: {n} samples" if in_full else f"evaluate: up to {n} samples"
            sampler.run(
                output,
                "rollouts",
                queries,
                *source,
                desc,
                statistics=statistics,
                enough=None if in_full else enough,
            )
        if "one_step" in modes:
            alone = _queries(rows, listed, data_card, engine, settings.prompt, one_step=True)
            sampler.run(output, "one_step", alone, *source, "evaluate: one_step", greedy=True)
        if in_full:
            in_all = _votes(output, rows, names, allowed, n)
            votes |= {mode: in_all for mode in modes}
        if adapts:
            by_count = {c: _votes(output, rows, names, allowed, c) for c in settings.counts}
            decisions = {
                key: adaptive.decide(
                    {count: of_image[key] for count, of_image in by_count.items()},
                    settings.num_options,
                    thresholds,
                )
                for key in labels
            }
            votes["adaptive"] = {key: by_count[d.num_rollouts][key] for key, d in decisions.items()}
        for mode in (each for each in OF_QUESTIONS if each in modes):
            most = settings.num_options
            options[mode] = (
                injected_options(votes[mode], labels, most, seed)
                if mode == "mcq"
                else {
                    key: proposed_options(
                        of_image,
                        decisions[key].num_options if mode == "adaptive" else most,
                        seed,
                        key,
                    )
                    for key, of_image in votes[mode].items()
                }
            )
            queries = choice_queries(
                options[mode],
                data_card,
                engine.prompt_style,
                constrained=mode == "constrained",
            )
            sampler.run(output, mode, queries, *source, f"evaluate: {mode}", greedy=True)

    completions = {mode: _completions(output, mode) for mode in modes if mode != "majority"}

    def read(mode: str, key: str) -> Reading:
        if mode == "one_step":
            return read_open(completions[mode][key], names, taxonomy)
        offered = options.get(mode, {}).get(key, [])
        if mode == "majority" or (mode == "adaptive" and len(offered) < 2):
            return read_majority(votes[mode][key], data_card)
        completion = completions[mode].get(key)
        return read_choice(completion, offered, data_card, constrained=mode == "constrained")

    predictions = [
        _prediction(
            row,
            mode,
            read(mode, row["image_id"]),
            options.get(mode, {}).get(row["image_id"], []),
            votes[mode].get(row["image_id"]),
            data_card,
        )
        for row in rows
        for mode in modes
    ]
    schema = schemas.predictions(data_card.classes)
    shards.write(output / "predictions.parquet", predictions, schema)
    if in_full:
        _write_pass_at_k(output, rows, in_all)
    if adapts:
        adaptive.write(output, decisions, options["adaptive"])
    stats: dict[str, Any] = statistics.values() if sampled else {"images": len(rows)}
    stats["thoughts"] = cost.thoughts(output, policy, [*labels], modes)
    save_stats(output, throughput(stats, sampler))
    for group in GROUPS:
        accuracies = [
            f"{mode} {np.mean([p['correct'] for p in predictions if p['mode'] == mode and p['group'] == group]):.3f}"
            for mode in modes
            if any(p["group"] == group for p in predictions)
        ]
        print(f"evaluate: {group} {' '.join(accuracies)}")


def _allowed(rows: Sequence[Row], group: str, prompt: str, card: Card) -> set[int]:
    """The classes that count as candidates: the group's if the prompt lists them, else all."""
    if prompt == "closed_list":
        return {row["label"] for row in rows if row["group"] == group}
    return set(range(len(card.classes)))


def _queries(
    rows: Sequence[Row],
    listed: dict[str, list[str]],
    card: Card,
    engine: EngineSettings,
    prompt: str,
    *,
    one_step: bool = False,
) -> list[Query]:
    """The open question about every image; a closed list shows the names that `listed` has for its group."""
    texts = {
        group: prompts.card_question(
            card,
            prompt,
            names,
            style=engine.prompt_style,
            list_position=engine.list_position,
            one_step=one_step,
        )
        for group, names in listed.items()
    }
    return [Query(row["image_id"], *texts[row["group"]][::-1]) for row in rows]


def _votes(
    output: Path, rows: Sequence[Row], names: ClassNames, allowed: dict[str, set[int]], first: int
) -> dict[str, Votes]:
    """The votes of the `first` rollouts of every image, over the classes that count in its group."""
    # Groups with the same classes, as with the open question, are merged in one pass.
    merged = {
        classes: merge_all(output, names, set(classes), first)
        for classes in {frozenset(allowed[group]) for group in GROUPS}
    }
    return {
        row["image_id"]: merged[frozenset(allowed[row["group"]])][row["image_id"]] for row in rows
    }


def _prediction(
    row: Row,
    mode: str,
    reading: Reading,
    options: list[Option],
    votes: Votes | None,
    card: Card,
) -> Row:
    return {
        "image_id": row["image_id"],
        "label": row["label"],
        "group": row["group"],
        "mode": mode,
        "options": option_names(options, card),
        "completion": reading.completion,
        "answer": reading.answer,
        "class_id": -1 if reading.class_id is None else reading.class_id,
        "correct": reading.class_id == row["label"],
        "status": reading.status,
        "letter": reading.letter,
        "truth_letter": letter_of(row["label"], options),
        "vote_share": None if votes is None else vote_share(votes, reading.class_id),
    }


def _completions(output: Path, table: str) -> dict[str, str]:
    """The answers by image id; empty where no image had two options."""
    if not list(output.glob(f"{table}-[0-9]*.parquet")):
        return {}
    columns = ["image_id", "completion"]
    return {r["image_id"]: r["completion"] for r in shards.iter_rows(output, table, columns)}


def _write_pass_at_k(output: Path, rows: Sequence[Row], votes: dict[str, Votes]) -> None:
    """Write the unbiased Pass@k of each group."""
    curves: dict[str, Any] = {"images": {}}
    for group in GROUPS:
        members = [row for row in rows if row["group"] == group]
        hits = np.array([_truth_votes(votes[row["image_id"]], row["label"]) for row in members])
        curves["images"][group] = len(members)
        if members:
            n = votes[members[0]["image_id"]].num_rollouts
            curves[group] = [float(np.mean(pass_at_k(n, hits, k))) for k in range(1, n + 1)]
    (output / "pass_at_k.json").write_text(json.dumps(curves), encoding="utf-8")


def _truth_votes(votes: Votes, label: int) -> int:
    return next((c.votes for c in votes.candidates if c.class_id == label), 0)


if __name__ == "__main__":
    main(evaluate)
