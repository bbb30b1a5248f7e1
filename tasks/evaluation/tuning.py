"""Sets the thresholds of adaptive inference on validation images of base classes.

Each image is sampled in full, and asked every question that the adaptive mode could ask about it. So
every combination of thresholds is scored by real answers. The rule: of all combinations whose
accuracy is at most WITHIN below that of two-step inference with all samples, the one with the fewest
answers an image; where there is none, the most accurate one. Test images take no part.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cards import Card
from tasks.engines.sampler import Sampler
from tasks.engines.worker import Query
from tasks.evaluation.adaptive import NEVER, Thresholds, decide, save
from tasks.evaluation.modes import choice_queries, proposed_options, read_choice, read_majority
from tasks.evaluation.settings import EvaluateSettings
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge_all
from tasks.questions.votes import Votes
from tasks.runtime.errors import StageError
from tasks.tables import shards, split_table

WITHIN = 0.01  # accuracy that may be lost against two-step inference with all samples
# Few values are tried: the best of many would owe its rank on some hundred images to chance.
SHARES = (0.5, 0.75, 1.0, NEVER)  # of `stop` and `agree`
PAIRS = (0.75, 0.9, NEVER)
TABLE = "val_rollouts"


def val_rows(split: Path, limit: int) -> split_table.Rows:
    """The val images of base classes, on which the thresholds of adaptive are set."""
    try:
        rows = split_table.select(split, "val", ("base",))
    except StageError as error:
        raise StageError(
            f"{error}; [Evaluate] mode adaptive sets its thresholds on them: see [Split] val_share"
        ) from error
    return rows[: limit or None]


def tune(
    output: Path,
    sampler: Sampler,
    queries: Sequence[Query],
    source: tuple[Path, int],
    labels: Mapping[str, int],
    allowed: set[int],
    card: Card,
    style: str,
    settings: EvaluateSettings,
    seed: int,
) -> Thresholds:
    """Ask about val images with `labels`, and write and return the thresholds.

    `queries` are the open questions, `source` the images' folder and the images a shard. The answers
    are written to `val_rollouts-*` and `val_<samples>_<options>-*`.
    """
    names = ClassNames.of(card)
    sampler.run(output, TABLE, queries, *source, f"evaluate: {TABLE}")
    votes = {count: merge_all(output, names, allowed, count, TABLE) for count in settings.counts}
    right: dict[tuple[int, int], dict[str, bool]] = {}
    for count, by_image in votes.items():
        right[count, 1] = {
            key: read_majority(by_image[key], card).class_id == label
            for key, label in labels.items()
        }
        for most in {2, settings.num_options}:
            options = {key: proposed_options(by_image[key], most, seed, key) for key in labels}
            table = f"val_{count}_{most}"
            asked = choice_queries(options, card, style)
            sampler.run(output, table, asked, *source, f"evaluate: {table}", greedy=True)
            said = {
                row["image_id"]: row["completion"]
                for row in (shards.iter_rows(output, table) if asked else ())
            }
            right[count, most] = {
                key: read_choice(said.get(key), options[key], card).class_id == label
                for key, label in labels.items()
            }
    thresholds, figures = choose(votes, right, settings.num_options)
    how = ("num_rollouts", "num_options", "instalments", "prompt")
    save(output, thresholds, figures, {name: getattr(settings, name) for name in how})
    return thresholds


def choose(
    votes: Mapping[int, Mapping[str, Votes]],
    right: Mapping[tuple[int, int], Mapping[str, bool]],
    most: int,
) -> tuple[Thresholds, dict[str, Any]]:
    """The thresholds by the module's rule, and the figures behind them.

    `votes` holds the votes by number of samples (ascending) and image. `right` tells whether the
    answer after so many samples, to a question with so many options (1, 2 or `most`), is right.
    """
    last = max(votes)
    images = {image: {n: votes[n][image] for n in votes} for image in votes[last]}

    def outcome(thresholds: Thresholds, counts: Sequence[int]) -> tuple[float, float]:
        """Accuracy, and answers an image."""
        correct = answers = 0
        for image, by_count in images.items():
            own = {count: by_count[count] for count in counts}
            count, options = decide(own, most, thresholds)
            correct += right[count, options][image]
            asks = options > 1 and len(by_count[count].candidates) > 1
            answers += count + asks
        return correct / len(images), answers / len(images)

    full = outcome(Thresholds(NEVER, NEVER, NEVER), [last])
    tried = [
        (*outcome(thresholds, list(votes)), thresholds)
        for thresholds in itertools.starmap(Thresholds, itertools.product(SHARES, SHARES, PAIRS))
    ]
    near = [each for each in tried if each[0] >= full[0] - WITHIN - 1e-9]
    accuracy, answers, thresholds = (
        min(near, key=lambda each: (each[1], -each[0]))
        if near
        else max(tried, key=lambda each: (each[0], -each[1]))
    )
    return thresholds, {
        "images": len(images),
        "accuracy": accuracy,
        "answers": answers,
        "two_step": {"accuracy": full[0], "answers": full[1]},
        "within": WITHIN,
        "met": bool(near),
    }
