"""Writes frozen questions in the formats of other trainers: Visual-RFT, EasyR1 and verl.

These trainers compare an answer with a letter. So an exported question asks for a letter, also where
ours takes a letter or a name. An open question, which has one option, has the name as its solution.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, List, Value
from datasets.utils.logging import disable_progress_bar

from tasks.language import prompts
from tasks.runtime.errors import StageError
from tasks.tables import shards

STR = Value("string")
PLACEHOLDER = "<image>"  # marks the image in a prompt, for trainers of the verl family
Row = dict[str, Any]

# What each trainer reads, and what else it needs; printed by --help.
NEEDS = """\
visual_rft   a folder for DatasetDict.load_from_disk, with image, problem and solution; for Visual-RFT and
             the official trainer. Name the folder in their --dataset_name. Their rewards read the letter.
easyr1       Parquet files with images, problem and answer. Name the folder in data.train_files; its
             reward function has to compare the text in <answer> with the letter.
verl         Parquet files with data_source, prompt, images, ability, reward_model and extra_info. It needs:
             data.train_files=[OUTPUT/train-00000.parquet,...]   and data.val_files
             data.image_key=images
             custom_reward_function.path=tasks/verl_reward.py
             custom_reward_function.name=compute_score
             This function is the reward of our own training, by our parser: 1 for format and 1 for the
             right option, by letter or name. This project must be installed beside verl."""


def export_questions(mcq: Path, style: str, output: Path) -> int:
    """Write the question shards of `mcq` in another trainer's format. Returns the question count.

    Raises StageError for an unknown format, and for an `output` that holds files already.
    """
    if style not in FORMATS:
        raise StageError(f"--format must be one of {', '.join(FORMATS)}; got {style!r}")
    require_empty(output)
    features, paths = FORMATS[style][0], shards.paths(mcq, "mcq")
    count = sum(map(shards.num_rows, paths))
    output.mkdir(parents=True, exist_ok=True)
    if style == "visual_rft":
        disable_progress_bar()
        with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as cache:
            rows = Dataset.from_generator(
                _rows,
                features=features,
                gen_kwargs={"paths": paths, "style": style},
                cache_dir=cache,
            )
            DatasetDict({"train": rows}).save_to_disk(output)
        return count
    start = 0
    for index, path in enumerate(paths):
        rows = list(_rows([path], style, start))
        shards.write(shards.shard_path(output, "train", index), rows, features.arrow_schema)
        start += len(rows)
    return count


def require_empty(folder: Path) -> None:
    """Raise StageError where a folder holds files, which would stay among the new ones."""
    if folder.exists() and any(folder.iterdir()):
        raise StageError(f"{folder} is not empty; delete it, or name another --output")


def _rows(paths: list[Path], style: str, start: int = 0) -> Iterator[Row]:
    """The rows of question shards in a format, numbered from `start`."""
    _, convert = FORMATS[style]
    number = start
    for path in paths:
        for batch in shards.iter_batches(path, None, 256):
            for row in batch.to_pylist():
                yield convert(row, number)
                number += 1


def _answer(row: Row) -> str:
    """The letter of the truth, or its name where the question is open.

    Raises StageError for a question without an answer, as training without labels has them.
    """
    if not row["answer_letter"]:
        raise StageError(
            f"the question about {row['image_id']} has no answer, since it is for training without labels; "
            "other trainers' formats need one: export the questions of another method"
        )
    return row["options"][0] if len(row["options"]) == 1 else row["answer_letter"]


def _visual_rft(row: Row, _: int) -> Row:
    return {
        "image": row["image"],
        "problem": prompts.by_letter(row["question"]),
        "solution": f"<answer>{_answer(row)}</answer>",
    }


def _easyr1(row: Row, _: int) -> Row:
    return {
        "images": [row["image"]],
        "problem": PLACEHOLDER + prompts.by_letter(row["question"]),
        "answer": _answer(row),
    }


def _verl(row: Row, number: int) -> Row:
    content = PLACEHOLDER + prompts.by_letter(row["question"])
    extra = {"index": number, "split": "train", "mcq_id": row["mcq_id"], "options": row["options"]}
    extra["prompt_style"] = prompts.style_of(row["question"])
    return {
        "data_source": row["image_id"].split("/")[0],
        "prompt": [{"role": "user", "content": content}],
        "images": [row["image"]],
        "ability": "fine_grained_recognition",
        "reward_model": {"style": "rule", "ground_truth": _answer(row)},
        "extra_info": extra,
    }


FORMATS: dict[str, tuple[Features, Callable[[Row, int], Row]]] = {
    "visual_rft": (Features({"image": Image(), "problem": STR, "solution": STR}), _visual_rft),
    "easyr1": (Features({"images": List(Image()), "problem": STR, "answer": STR}), _easyr1),
    "verl": (
        Features(
            {
                "data_source": STR,
                "prompt": List({"role": STR, "content": STR}),
                "images": List(Image()),
                "ability": STR,
                "reward_model": {"style": STR, "ground_truth": STR},
                "extra_info": {
                    "index": Value("int64"),
                    "split": STR,
                    "mcq_id": STR,
                    "options": List(STR),
                    "prompt_style": STR,
                },
            }
        ),
        _verl,
    ),
}
