"""The Arrow schema of every artifact: the contract between stages.

Each schema carries Hugging Face feature metadata, so `datasets.load_dataset("parquet", ...)`
decodes images and class names, while pandas, DuckDB and pyarrow read the same files.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from datasets import ClassLabel, Features, Image, List, Value

STR, INT, FLOAT, BOOL = Value("string"), Value("int32"), Value("float32"), Value("bool")

GROUPS = ("base", "novel")
# `pretrain` is what BasePolicy's supervised pretraining may see, and nothing else may; `unused`
# are the train images of novel classes, which base-to-novel training must never touch.
SPLITS = ("pretrain", "train", "val", "test", "unused")
# Where an option came from: proposed, injected, added; or what an ablation put in its place.
SOURCES = ("policy", "truth", "top_up", "random", "text", "hard_negative")


def images(names: Sequence[str]) -> pa.Schema:
    """Download: one row is an image; `names` are the card's classes by class id.

    `sha256` is of the bytes; `pixels` and `dhash` are fingerprints of what they show
    (`tasks/ingest/pictures.py`): equal for the same picture, near for pictures that look alike.
    """
    return _schema(
        image_id=STR,
        image=Image(),
        sha256=STR,
        pixels=STR,
        dhash=Value("int64"),
        width=INT,
        height=INT,
        label=ClassLabel(names=list(names)),
        official_split=STR,
    )


def rejects() -> pa.Schema:
    """Download: one row is a file that could not be used, and why."""
    return _schema(path=STR, reason=STR)


def split(names: Sequence[str]) -> pa.Schema:
    """Split: one row is an image's place in the protocol."""
    label = ClassLabel(names=list(names))
    return _schema(image_id=STR, label=label, class_name=STR, group=STR, split=STR)


def duplicates() -> pa.Schema:
    """Split: one row is an image that repeats one of an earlier split; `distance` in bits of 64."""
    return _schema(
        image_id=STR,
        split=STR,
        twin_id=STR,
        twin_split=STR,
        same_class=BOOL,
        same_pixels=BOOL,
        distance=INT,
    )


def rollouts() -> pa.Schema:
    """Propose: one row is one sampled response, raw. `mean_logprob` is in nats per token."""
    return _schema(
        image_id=STR,
        rollout=INT,
        completion=STR,
        finish_reason=STR,
        num_tokens=INT,
        mean_logprob=FLOAT,
    )


def refused() -> pa.Schema:
    """Propose, Evaluate: one row is an image that the engine would not take, and why."""
    return _schema(image_id=STR, reason=STR)


def candidates(names: Sequence[str]) -> pa.Schema:
    """BuildMCQ: one row is an image's merged candidates by falling votes, skipped images included.

    `truth_rank` counts from 1 and is null when the truth was never proposed; `class_ids` holds -1
    for a name that is no class of the card; `num_outside` counts answers that are no candidate.
    The lists `answers` hold every distinct answer by falling votes ("" if unreadable), the class
    it names (-1: none), and the step of matching or the fault of the text that decided so.
    """
    return _schema(
        image_id=STR,
        label=ClassLabel(names=list(names)),
        names=List(STR),
        class_ids=List(INT),
        votes=List(INT),
        truth_rank=INT,
        truth_votes=INT,
        num_rollouts=INT,
        num_unparsed=INT,
        num_outside=INT,
        outcome=STR,
        answers=List(STR),
        answer_votes=List(INT),
        answer_class_ids=List(INT),
        answer_steps=List(STR),
    )


def mcq() -> pa.Schema:
    """BuildMCQ: one row is a frozen question; options, ids, votes and sources run in parallel.

    `truth_share`, `margin` and `entropy` say how hard it is (`tasks.questions.tables.difficulties`);
    `label_differs` that the answer is the policy's majority and not the image's label.
    """
    return _schema(
        mcq_id=STR,
        image_id=STR,
        image=Image(),
        question=STR,
        options=List(STR),
        option_class_ids=List(INT),
        option_votes=List(INT),
        option_sources=List(STR),
        answer_letter=STR,
        truth_injected=BOOL,
        label_differs=BOOL,
        truth_share=FLOAT,
        margin=FLOAT,
        entropy=FLOAT,
    )


def predictions(names: Sequence[str]) -> pa.Schema:
    """Evaluate: one row is one image asked in one mode.

    `class_id` is -1 when the answer is no class of the card; `status` says how the answer was read
    or why there is none. `options` is empty where the mode asks no multiple-choice question.
    `letter` is the option chosen and `truth_letter` that of the truth ("" where there is none);
    `vote_share` is the share of the image's rollouts that named the class answered, 0 where the
    answer is no class, null where nothing was sampled.
    """
    return _schema(
        image_id=STR,
        label=ClassLabel(names=list(names)),
        group=STR,
        mode=STR,
        options=List(STR),
        completion=STR,
        answer=STR,
        class_id=INT,
        correct=BOOL,
        status=STR,
        letter=STR,
        truth_letter=STR,
        vote_share=FLOAT,
    )


def verdicts() -> pa.Schema:
    """Judge: one row is a pair of names that a judge was asked about.

    `question` is what was asked for ("species of bird"); `status` is yes, no, or why there is no
    verdict. The first five columns are what a verdict is remembered by.
    """
    return _schema(prompt_version=INT, model=STR, question=STR, truth=STR, answer=STR, status=STR)


def judgements(names: Sequence[str]) -> pa.Schema:
    """Judge: one row is a prediction of a mode that is answered in free text.

    `correct` is decided by the card's names alone. `judged` is the judge's verdict, null where it
    was not asked or gave none, and `correct_judged` is what both say, null where it gave none.
    `status` is matched, no_answer, yes, no, or why there is no verdict.
    """
    return _schema(
        image_id=STR,
        label=ClassLabel(names=list(names)),
        group=STR,
        mode=STR,
        answer=STR,
        correct=BOOL,
        judged=BOOL,
        correct_judged=BOOL,
        status=STR,
    )


def train_log(rewards: Sequence[str]) -> pa.Schema:
    """Train: one row is an optimiser step; lengths in tokens, times in seconds.

    `reward/<name>` is the mean of one of the `rewards`, before its weight. `dead_group_share` is of
    groups whose rewards are all equal, `replaced_group_share` of those other questions stood in for.
    `base_drift` is what handing adapters to vLLM moved the base weights by, before it was undone.
    `val_accuracy` and `val_unreadable` are shares of the val images that were watched, at the steps
    after which they were.
    """
    numbers = (
        "loss",
        "learning_rate",
        "grad_norm",
        "reward",
        "reward_std",
        *(f"reward/{name}" for name in rewards),
        "advantage_spread",
        "dead_group_share",
        "replaced_group_share",
        "kl",
        "entropy",
        "completion_length",
        "clipped_share",
        "base_drift",
        "tokens_per_second",
        "seconds_generation",
        "seconds_reward",
        "seconds_update",
        "seconds",
        "val_accuracy",
        "val_unreadable",
    )
    return _schema(step=INT, **{name: FLOAT for name in numbers})


def completions(rewards: Sequence[str]) -> pa.Schema:
    """Train: one row is a completion sampled while training, with each of its `rewards`.

    `step` is the first optimiser step that learned from it.
    """
    return _schema(
        step=INT,
        image_id=STR,
        mcq_id=STR,
        completion=STR,
        advantage=FLOAT,
        **{f"reward/{name}": FLOAT for name in rewards},
    )


def _schema(**features: Any) -> pa.Schema:
    return Features(features).arrow_schema
