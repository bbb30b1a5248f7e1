"""Evaluate: what a policy answers on base and novel test images, in every mode.

    python -m tasks.evaluate CONFIG.json

Modes: `one_step` is the greedy answer to the open question; `two_step` samples N answers, merges
them into the top-k candidates and asks the multiple-choice question about them, greedily;
`majority` is the most voted candidate. Merging and question building are BuildMCQ's own functions,
without the truth. Every test image counts in every mode: what fails is wrong, with a status.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_cards import Card, load
from tasks import answers, prompts, schemas, shards
from tasks.candidates import Votes, merge_all
from tasks.labels import ClassNames
from tasks.metrics import pass_at_k
from tasks.options import Option, shuffle_options
from tasks.propose import question, select
from tasks.run import main, save_stats
from tasks.sampler import Sampler, Tally, throughput
from tasks.schemas import GROUPS
from tasks.seeding import row_generator
from tasks.station import Ask

MODES = ("one_step", "majority", "two_step")


def evaluate(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    policy: Path,
    engine: dict[str, Any],
    part: str,
    num_rollouts: int,
    num_options: int,
    prompt: str,
    shard_size: int,
    seed: int,
) -> None:
    """Ask the policy about every image of one part (test, or val for tuning), base and novel.

    Writes the raw `rollouts-*`, `one_step-*` and `two_step-*` answers, `predictions.parquet` (one
    row per image and mode) and `pass_at_k.json` (unbiased Pass@1..N per group).
    """
    data_card = load(card)
    names = ClassNames(data_card.classes, data_card.aliases)
    style = engine["prompt_style"]
    rows = select(split, part, GROUPS)
    allowed = {group: _allowed(rows, group, prompt, data_card) for group in GROUPS}
    texts = {
        group: question(
            data_card, engine, prompt, [data_card.classes[i] for i in sorted(allowed[group])]
        )
        for group in GROUPS
    }
    asks = [Ask(row["image_id"], *texts[row["group"]][::-1]) for row in rows]
    tally = Tally({row["image_id"]: row["label"] for row in rows}, data_card)
    sampler = Sampler(policy, engine, num_rollouts, seed)
    place = (download, shard_size)
    with sampler:
        sampler.run(
            output, "rollouts", asks, *place, f"evaluate: {num_rollouts} samples", tally=tally
        )
        sampler.run(output, "one_step", asks, *place, "evaluate: one_step", greedy=True)
        votes, options = _candidates(output, rows, names, allowed, num_options, seed)
        asked = [row for row in rows if len(options[row["image_id"]]) >= 2]

        def mcq_text(row: dict[str, Any]) -> str:
            listed = [data_card.classes[option.class_id] for option in options[row["image_id"]]]
            return prompts.mcq_question(data_card.noun, data_card.kind, listed, style=style)

        asks = [Ask(row["image_id"], mcq_text(row)) for row in asked]
        sampler.run(output, "two_step", asks, *place, "evaluate: two_step", greedy=True)

    one = _completions(output, "one_step")
    two = _completions(output, "two_step") if asked else {}
    predictions = []
    for row in rows:
        key = row["image_id"]
        predictions += [
            _one_step(row, one[key], names, data_card),
            _majority(row, votes[key], data_card),
            _two_step(row, options[key], two.get(key), data_card),
        ]
    schema = schemas.predictions(data_card.classes)
    shards.write(output / "predictions.parquet", predictions, schema)
    _write_pass_at_k(output, rows, votes)
    save_stats(output, throughput(tally.stats(), sampler))
    for group in GROUPS:
        told = [
            f"{mode} {np.mean([p['correct'] for p in predictions if p['mode'] == mode and p['group'] == group]):.3f}"
            for mode in MODES
            if any(p["group"] == group for p in predictions)
        ]
        print(f"evaluate: {group} {' '.join(told)}")


def _allowed(rows: list[dict[str, Any]], group: str, prompt: str, card: Card) -> set[int]:
    """The classes that count as candidates: the group's when it was told them, else all."""
    if prompt == "closed_list":
        return {row["label"] for row in rows if row["group"] == group}
    return set(range(len(card.classes)))


def _candidates(
    output: Path,
    rows: list[dict[str, Any]],
    names: ClassNames,
    allowed: dict[str, set[int]],
    num_options: int,
    seed: int,
) -> tuple[dict[str, Votes], dict[str, list[Option]]]:
    """Votes and, in random order, the options of every image's question."""
    # Groups that may answer alike, as with the open question, are merged in one reading.
    merged = {
        classes: merge_all(output, names, set(classes))
        for classes in {frozenset(allowed[group]) for group in GROUPS}
    }
    votes = {
        row["image_id"]: merged[frozenset(allowed[row["group"]])][row["image_id"]] for row in rows
    }
    options = {
        row["image_id"]: _options(votes[row["image_id"]], row, num_options, seed) for row in rows
    }
    return votes, options


def _options(votes: Votes, row: dict[str, Any], num_options: int, seed: int) -> list[Option]:
    top = [Option(c.class_id, c.votes, "policy") for c in votes.candidates[:num_options]]
    return shuffle_options(top, row_generator(seed, row["image_id"]))


def _one_step(
    row: dict[str, Any], completion: str, names: ClassNames, card: Card
) -> dict[str, Any]:
    parsed = answers.parse(completion)
    if parsed.answer is None:
        return _prediction(row, "one_step", completion, None, parsed.problem, card)
    match = names.match(parsed.answer)
    return _prediction(row, "one_step", completion, match.class_id, match.step, card, parsed.answer)


def _majority(row: dict[str, Any], votes: Votes, card: Card) -> dict[str, Any]:
    if not votes.candidates:
        return _prediction(row, "majority", "", None, "no_candidates", card)
    winner = votes.candidates[0]
    status = f"{winner.votes} of {votes.num_rollouts} votes"
    return _prediction(row, "majority", "", winner.class_id, status, card)


def _two_step(
    row: dict[str, Any], options: list[Option], completion: str | None, card: Card
) -> dict[str, Any]:
    listed = [card.classes[option.class_id] for option in options]
    if not options:
        return _prediction(row, "two_step", "", None, "no_candidates", card)
    if len(options) == 1:
        only = options[0].class_id
        return _prediction(row, "two_step", "", only, "single_candidate", card, options=listed)
    assert completion is not None  # every row with two options was asked
    choice = answers.choose(completion, listed)
    chosen = None if choice.index is None else options[choice.index].class_id
    answer = answers.parse(completion).answer or ""
    return _prediction(
        row, "two_step", completion, chosen, choice.status, card, answer, options=listed
    )


def _prediction(
    row: dict[str, Any],
    mode: str,
    completion: str,
    class_id: int | None,
    status: str,
    card: Card,
    answer: str | None = None,
    options: list[str] | None = None,
) -> dict[str, Any]:
    if answer is None:
        answer = "" if class_id is None else card.classes[class_id]
    return {
        "image_id": row["image_id"],
        "label": row["label"],
        "group": row["group"],
        "mode": mode,
        "options": options or [],
        "completion": completion,
        "answer": answer,
        "class_id": -1 if class_id is None else class_id,
        "correct": class_id == row["label"],
        "status": status,
    }


def _completions(output: Path, table: str) -> dict[str, str]:
    columns = ["image_id", "completion"]
    return {r["image_id"]: r["completion"] for r in shards.iter_rows(output, table, columns)}


def _write_pass_at_k(output: Path, rows: list[dict[str, Any]], votes: dict[str, Votes]) -> None:
    """Unbiased Pass@k per group; the truth is always among the classes that were counted."""
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
