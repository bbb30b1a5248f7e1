"""Builds the open question about every train image, for the methods that train on open questions.

    python -m tasks.build_open recipe.json

The baselines that train on the open question (exact match, supervised) need no proposals. Their
shards have the schema of multiple-choice questions, with the truth as the only option, so that Train
and the checks read both alike.
"""

from pathlib import Path

from data_cards import load
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
) -> None:
    """Write `mcq-*.parquet` and `stats.json`: the open question about every base-class train image.

    With `prompt = closed_list` the question lists the base classes. Images without a label give no
    question. Raises StageError when no image has a label.
    """
    data_card = load(card)
    rows = split_table.select(split, "train", ("base",))
    asked = [row for row in rows if row["label"] is not None and row["label"] >= 0]
    if not asked:
        raise StageError(f"{split}: no train image has a label to learn from")
    names = [data_card.classes[label] for label in sorted({row["label"] for row in asked})]
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
                    "mcq_id": mcq_id(row["image_id"], [row["label"]]),
                    "image_id": row["image_id"],
                    "image": {"bytes": bytes_of[row["image_id"]], "path": row["image_id"]},
                    "question": text,
                    "options": [data_card.classes[row["label"]]],
                    "option_class_ids": [row["label"]],
                    "option_votes": [0],
                    "option_sources": ["truth"],
                    "answer_letter": "A",
                    "truth_injected": True,
                    "label_differs": False,
                    "truth_share": 0.0,
                    "margin": 0.0,
                    "entropy": 0.0,
                }
                for row in part
            ]
            shards.write(path, questions, schemas.mcq())
    save_stats(output, {"images": len(rows), "questions": len(asked), "seed": seed})
    print(f"build_open: {len(asked)} open questions from {len(rows)} images")


if __name__ == "__main__":
    main(build_open)
