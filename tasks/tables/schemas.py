"""The Arrow schema of every table that a stage writes: the contract between stages.

Each schema carries the metadata of Hugging Face features. So `datasets.load_dataset("parquet", ...)`
decodes images and class names, while pandas, DuckDB and pyarrow read the same files. The metadata is
written here, since every stage's process reads this module, and importing `datasets` takes half a second.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa


class Feature(NamedTuple):
    """A column's Arrow type, and the feature of `datasets` as its own metadata spell it."""

    arrow: pa.DataType
    feature: dict[str, Any]


def _value(arrow: pa.DataType, dtype: str) -> Feature:
    return Feature(arrow, {"dtype": dtype, "_type": "Value"})


STR, BOOL = _value(pa.string(), "string"), _value(pa.bool_(), "bool")
INT, LONG, FLOAT = (
    _value(pa.int32(), "int32"),
    _value(pa.int64(), "int64"),
    _value(pa.float32(), "float32"),
)
IMAGE = Feature(pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"})


def _list(of: Feature) -> Feature:
    return Feature(pa.list_(of.arrow), {"feature": of.feature, "_type": "List"})


def _label(names: Sequence[str]) -> Feature:
    return Feature(pa.int64(), {"names": list(names), "_type": "ClassLabel"})


GROUPS = ("base", "novel")
# `pretrain` images are for BasePolicy's supervised pretraining alone. `unused` are the train images
# of novel classes, which base-to-novel training must never see, and those that few shots and caps leave
# out. Training without labels sees those of novel classes where it is asked to.
SPLITS = ("pretrain", "train", "val", "test", "unused")
JOINT = "+"  # joins the ids of a question and of its partner's image, in training in pairs
# Where an option came from: proposed by the policy, the injected truth, a top-up, or an ablation.
SOURCES = ("policy", "truth", "top_up", "random", "text", "hard_negative")


def images(names: Sequence[str]) -> pa.Schema:
    """Download: one row is an image; `names` are the card's classes by class id.

    `sha256` is that of the bytes. `pixels` (equal for the same picture) and `dhash` (near for
    pictures that look alike) are fingerprints of the decoded picture: `tasks/ingest/pictures.py`.
    """
    return _schema(
        image_id=STR,
        image=IMAGE,
        sha256=STR,
        pixels=STR,
        dhash=LONG,
        width=INT,
        height=INT,
        label=_label(names),
        official_split=STR,
    )


def rejects() -> pa.Schema:
    """Download: one row is an unusable file, with the reason."""
    return _schema(path=STR, reason=STR)


def split(names: Sequence[str]) -> pa.Schema:
    """Split: one row is an image with its class, group and split."""
    label = _label(names)
    return _schema(image_id=STR, label=label, class_name=STR, group=STR, split=STR)


def duplicates() -> pa.Schema:
    """Split: one row is an image that repeats one (`twin`) of an earlier split.

    `distance` is the count of differing bits of their 64-bit difference hashes.
    """
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
    """Propose: one row is one sampled completion, as generated. `mean_logprob` is in nats a token."""
    return _schema(
        image_id=STR,
        rollout=INT,
        completion=STR,
        finish_reason=STR,
        num_tokens=INT,
        mean_logprob=FLOAT,
    )


def refused() -> pa.Schema:
    """Propose, Evaluate: one row is an image without answers, with the reason, such as the engine's."""
    return _schema(image_id=STR, reason=STR)


def candidates(names: Sequence[str]) -> pa.Schema:
    """BuildMCQ: one row is an image with its candidates by falling votes, skipped images included.

    `truth_rank` counts from 1 and is null when the truth was never proposed. `class_ids` holds -1
    for a name that is no class of the card. `num_outside` counts answers that are no candidate.
    `answers` are all distinct answers by falling votes ("" if unreadable); the lists beside it hold
    their votes, the class each names (-1: none), and the matching step or parser problem behind it.
    """
    return _schema(
        image_id=STR,
        label=_label(names),
        names=_list(STR),
        class_ids=_list(INT),
        votes=_list(INT),
        truth_rank=INT,
        truth_votes=INT,
        num_rollouts=INT,
        num_unparsed=INT,
        num_outside=INT,
        outcome=STR,
        answers=_list(STR),
        answer_votes=_list(INT),
        answer_class_ids=_list(INT),
        answer_steps=_list(STR),
    )


def mcq() -> pa.Schema:
    """BuildMCQ: one row is a frozen question. The four lists of options run in parallel.

    `truth_share`, `margin` and `entropy` measure its difficulty (`tasks.questions.tables`).
    `label_differs` means that the answer is the policy's majority and not the image's label. A question
    for training without labels has no options, and "" for a letter.
    """
    return _schema(
        mcq_id=STR,
        image_id=STR,
        image=IMAGE,
        question=STR,
        options=_list(STR),
        option_class_ids=_list(INT),
        option_votes=_list(INT),
        option_sources=_list(STR),
        answer_letter=STR,
        truth_injected=BOOL,
        label_differs=BOOL,
        truth_share=FLOAT,
        margin=FLOAT,
        entropy=FLOAT,
    )


def predictions(names: Sequence[str]) -> pa.Schema:
    """Evaluate: one row is the prediction for one image in one mode.

    `class_id` is -1 when the answer is no class of the card. `status` says how the answer was read,
    or why there is none. `options` is empty where the mode asks no multiple-choice question.
    `letter` is that of the option chosen, `truth_letter` that of the truth ("" where there is none).
    `vote_share` is the share of the image's rollouts that named the answered class: 0 where the
    answer is no class, null where nothing was sampled.
    """
    return _schema(
        image_id=STR,
        label=_label(names),
        group=STR,
        mode=STR,
        options=_list(STR),
        completion=STR,
        answer=STR,
        class_id=INT,
        correct=BOOL,
        status=STR,
        letter=STR,
        truth_letter=STR,
        vote_share=FLOAT,
    )


def adaptive() -> pa.Schema:
    """Evaluate: one row is an image of the mode adaptive, with its samples, and its options.

    With one option or none no question was asked.
    """
    return _schema(image_id=STR, num_rollouts=INT, num_options=INT)


def verdicts() -> pa.Schema:
    """Judge: one row is a pair of names that a judge was asked about.

    `question` is what is asked for ("species of bird"). `status` is yes, no, or the reason why there
    is no verdict. The first five columns are the key under which a verdict is reused.
    """
    return _schema(prompt_version=INT, model=STR, question=STR, truth=STR, answer=STR, status=STR)


def judgements(names: Sequence[str]) -> pa.Schema:
    """Judge: one row is a prediction of a mode that is answered in free text.

    `correct` follows from the card's names alone. `judged` is the judge's verdict, null where it was
    not asked or gave none. `correct_judged` is the verdict or, where the judge was not asked,
    `correct`; it is null where the judge gave no verdict. `status` is yes, no, the reason why there is
    no verdict or, where the judge was not asked, matched or no_answer.
    """
    return _schema(
        image_id=STR,
        label=_label(names),
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

    `reward/<name>` is the mean of one of the `rewards`, before its weight. `dead_group_share` is the
    share of groups whose rewards are all equal, `replaced_group_share` that of groups replaced by
    other questions. `base_drift` is how far merging adapters for vLLM moved the base weights, before
    that was undone. `val_accuracy` and `val_unreadable` are shares of the watched val images, null
    at steps without a validation.
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
    """Train: one row is a completion sampled during training, with each of its `rewards`.

    `step` is the first optimiser step that used it. A partner in training in pairs has an `mcq_id` of two
    questions' ids, joined by JOINT.
    """
    return _schema(
        step=INT,
        image_id=STR,
        mcq_id=STR,
        completion=STR,
        advantage=FLOAT,
        **{f"reward/{name}": FLOAT for name in rewards},
    )


def _schema(**columns: Feature) -> pa.Schema:
    features = {name: column.feature for name, column in columns.items()}
    return pa.schema(
        [(name, column.arrow) for name, column in columns.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
