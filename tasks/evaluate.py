"""Evaluate: asks a policy about base and novel test images, in every mode of inference.

    python -m tasks.evaluate recipe.json

`tasks/evaluation/modes.py` defines the modes, and how their answers are read. Candidates and questions
are made by BuildMCQ's own functions. Every test image counts in every mode: an answer that cannot be
read counts as wrong, and its status says why.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card, load
from tasks.engines import policies
from tasks.engines.sampler import RolloutStatistics, Sampler, throughput
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Query
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
from tasks.questions.candidates import Votes, merge_all
from tasks.questions.options import Option
from tasks.runtime.command import main
from tasks.runtime.protocol import save_stats
from tasks.tables import schemas, shards, split_table
from tasks.tables.schemas import GROUPS

Row = dict[str, Any]


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
    """Ask the policy about every image of one part (test, or val for tuning), base and novel.

    With a `limit`, only the first `limit` images of each group.

    Writes the raw answers of every mode that asks (`one_step-*`, `two_step-*`, ...) and the sampled
    `rollouts-*`, `predictions.parquet` (one row per image and mode) and `pass_at_k.json` (unbiased
    Pass@1..N per group). With one_step alone nothing is sampled. Raises StageError when the
    engine cannot do what a mode asks for.
    """
    modes = settings.mode_names
    data_card = load(card)
    policy = policies.local(policy, engine.backend)
    policies.check_words(policies.special_tokens(policy), data_card)
    names = ClassNames.of(data_card)
    rows = split_table.select(split, settings.part, GROUPS)
    if limit := settings.limit:
        rows = [row for g in GROUPS for row in [r for r in rows if r["group"] == g][:limit]]
    labels = {row["image_id"]: row["label"] for row in rows}
    allowed = {group: _allowed(rows, group, settings.prompt, data_card) for group in GROUPS}
    texts = {
        group: prompts.card_question(
            data_card,
            settings.prompt,
            [data_card.classes[i] for i in sorted(allowed[group])],
            style=engine.prompt_style,
            list_position=engine.list_position,
        )
        for group in GROUPS
    }
    queries = [Query(row["image_id"], *texts[row["group"]][::-1]) for row in rows]
    statistics = RolloutStatistics(labels, data_card)
    source = (download, settings.shard_size)
    votes: dict[str, Votes] = {}
    options: dict[str, dict[str, list[Option]]] = {}
    n = settings.num_rollouts
    with Sampler(policy, engine, n, seed) as sampler:
        if sampled := any(mode != "one_step" for mode in modes):
            desc = f"evaluate: {n} samples"
            sampler.run(output, "rollouts", queries, *source, desc, statistics=statistics)
        if "one_step" in modes:
            sampler.run(output, "one_step", queries, *source, "evaluate: one_step", greedy=True)
        if sampled:
            votes = _votes(output, rows, names, allowed)
        for mode in (each for each in OF_QUESTIONS if each in modes):
            options[mode] = (
                injected_options(votes, labels, settings.num_options, seed)
                if mode == "mcq"
                else {
                    key: proposed_options(votes[key], settings.num_options, seed, key)
                    for key in labels
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
            return read_open(completions[mode][key], names)
        if mode == "majority":
            return read_majority(votes[key], data_card)
        completion, offered = completions[mode].get(key), options[mode][key]
        return read_choice(completion, offered, data_card, constrained=mode == "constrained")

    predictions = [
        _prediction(
            row,
            mode,
            read(mode, row["image_id"]),
            options.get(mode, {}).get(row["image_id"], []),
            votes.get(row["image_id"]),
            data_card,
        )
        for row in rows
        for mode in modes
    ]
    schema = schemas.predictions(data_card.classes)
    shards.write(output / "predictions.parquet", predictions, schema)
    if sampled:
        _write_pass_at_k(output, rows, votes)
    save_stats(
        output, throughput(statistics.values() if sampled else {"images": len(rows)}, sampler)
    )
    for group in GROUPS:
        accuracies = [
            f"{mode} {np.mean([p['correct'] for p in predictions if p['mode'] == mode and p['group'] == group]):.3f}"
            for mode in modes
            if any(p["group"] == group for p in predictions)
        ]
        print(f"evaluate: {group} {' '.join(accuracies)}")


def _allowed(rows: list[Row], group: str, prompt: str, card: Card) -> set[int]:
    """The classes that count as candidates: the group's if the prompt lists them, else all."""
    if prompt == "closed_list":
        return {row["label"] for row in rows if row["group"] == group}
    return set(range(len(card.classes)))


def _votes(
    output: Path, rows: list[Row], names: ClassNames, allowed: dict[str, set[int]]
) -> dict[str, Votes]:
    """The votes of every image, over the classes that count in its group."""
    # Groups with the same classes, as with the open question, are merged in one pass.
    merged = {
        classes: merge_all(output, names, set(classes))
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


def _write_pass_at_k(output: Path, rows: list[dict[str, Any]], votes: dict[str, Votes]) -> None:
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
