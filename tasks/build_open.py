"""Builds the open question about every train image, for the methods that train on open questions.

    python -m tasks.build_open recipe.json

The methods that train on the open question (exact match, supervised, without labels) need no
proposals. Their shards have the schema of multiple-choice questions, with the truth as the only option,
so that Train and the checks read both alike. A question for training without labels has no option.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cards import Card, load
from tasks.language import prompts
from tasks.questions.options import mcq_id
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.interrupts import shard_by_shard, stop_if_asked
from tasks.runtime.progress import progress
from tasks.runtime.protocol import save_stats
from tasks.tables import schemas, shards, split_table


def build_open(
    output: Path,
    *,
    card: str,
    download: Path,
    split: Path,
    prompt: str,
    prompt_style: str,
    shard_size: int,
    seed: int,
    unlabelled_groups: str = "",
    unlabelled_part: str = "train",
) -> None:
    """Write `mcq-*.parquet` and `stats.json`: the open question about every base-class train image.

    With `prompt = closed_list` the question lists the base classes. Images without a label give no
    question. With `unlabelled_groups` it asks about these groups' images of `unlabelled_part` (train or
    test) instead, and the shards hold no label; a closed list then has these groups' classes. Raises
    StageError when no image has a label, or when one of the groups has no such image.
    """
    data_card = load(card)
    groups = unlabelled_groups.split()
    if groups:
        rows = asked = split_table.unlabelled(split, groups, unlabelled_part)
        names = _classes(split, groups)
    else:
        rows = split_table.select(split, "train", ("base",))
        asked = rows.labelled()
        if not asked:
            raise StageError(f"{split}: no train image has a label to learn from")
        names = [data_card.classes[label] for label in asked.classes]
    if prompt not in ("open", "closed_list"):
        raise StageError(f"prompt must be open or closed_list; got {prompt!r}")
    text = prompts.open_question(
        data_card.noun,
        data_card.kind,
        style=prompt_style,
        names=names if prompt == "closed_list" else None,
    )
    images = shards.ImageStore(download)
    parts = list(shards.chunks(asked, shard_size))
    with shard_by_shard(), progress(parts, desc="build", total=len(parts), unit="shards") as bar:
        for number, part in enumerate(bar):
            stop_if_asked()
            if (path := shards.shard_path(output, "mcq", number)).exists():
                continue
            bytes_of = images.read([row["image_id"] for row in part])
            questions = [
                {
                    "mcq_id": mcq_id(row["image_id"], [row["label"]] if "label" in row else []),
                    "image_id": row["image_id"],
                    "image": {"bytes": bytes_of[row["image_id"]], "path": row["image_id"]},
                    "question": text,
                    "truth_injected": "label" in row,
                    "label_differs": False,
                    "truth_share": 0.0,
                    "margin": 0.0,
                    "entropy": 0.0,
                    **_answer(row, data_card),
                }
                for row in part
            ]
            shards.write(path, questions, schemas.mcq())
    counts: dict[str, Any] = {"images": len(rows), "questions": len(asked), "seed": seed}
    kind = ""
    if groups:
        counts["unlabelled"] = dict(Counter(row["group"] for row in asked))
        kind = f": {unlabelled_part} images of {' and '.join(groups)} classes, without labels"
    save_stats(output, counts)
    print(f"build_open: {len(asked)} open questions from {len(rows)} images{kind}")


def _classes(split: Path, groups: Sequence[str]) -> list[str]:
    """The classes of some groups by class id, as the whole split has them."""
    rows = shards.read(split, "split", ["label", "class_name", "group"]).to_pylist()
    names = {row["label"]: row["class_name"] for row in rows if row["group"] in groups}
    return [name for _, name in sorted(names.items())]


def _answer(row: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """A question's columns that tell its answer; empty ones where the row has no label."""
    label = [row["label"]] if "label" in row else []
    return {
        "options": [card.classes[class_id] for class_id in label],
        "option_class_ids": label,
        "option_votes": [0 for _ in label],
        "option_sources": ["truth" for _ in label],
        "answer_letter": "A" if label else "",
    }


if __name__ == "__main__":
    main(build_open)
