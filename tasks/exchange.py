"""Imports rollouts of other programs for BuildMCQ, and exports questions to other trainers.

    python -m tasks.exchange import answers.json --card cub --images FOLDER --output imported
    python -m tasks.build_mcq imported/build_mcq.json
    python -m tasks.exchange export SHARDS --format visual_rft --output FOLDER

`import` reads the official code's JSON, `{image: {"groundtruth": name, "predictions": {name:
count}}}`; in place of predictions an image may have `"completions": [text, ...]`. It writes the
tables that BuildMCQ reads, and its configuration with the settings of luigi.cfg. `export` writes the
columns of these trainers: `visual_rft` (and the official trainer): image, problem, solution;
`easyr1`: images, problem, answer; `verl`: data_source, prompt, images, ability, reward_model,
extra_info.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from data_cards import Card, CardError, load
from tasks.ingest.pictures import Reject, image_row, normalise_image
from tasks.language import prompts
from tasks.language.class_names import ClassNames
from tasks.runtime.errors import ShardError, StageError
from tasks.tables import schemas, shards

STR = Value("string")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES_PER_SHARD = 500
PLACEHOLDER = "<image>"  # marks the image in a prompt, for trainers of the verl family
Row = dict[str, Any]


def import_rollouts(file: Path, card: Card, images: Path, output: Path) -> dict[str, int]:
    """Write `download/`, `split/` and `propose/` below `output` from a JSON file of answers.

    The file names an image by its path below `images`, or by a file name that occurs there once. Its
    image id is `<card>/<path>`. The classes that occur as ground truth are the ones offered. Returns
    the counts of images and rollouts. Raises StageError for a file of another form, an image that is
    missing or ambiguous, and a ground truth that is no class of the card.
    """
    answers = _read_json(file)
    names = ClassNames.of(card)
    files = _find_images(answers, images)
    rows = []
    for key, path in sorted(files.items(), key=lambda item: item[1].as_posix()):
        texts = _completions(file, key, answers[key])  # first, because it checks the entry's form
        truth = answers[key].get("groundtruth")
        label = -1 if truth is None else names.match(str(truth)).class_id
        if label is None:
            raise StageError(
                f"{file}: the ground truth of {key!r}, {truth!r}, is no class of the card "
                f"{card.name}; add it there as an alias"
            )
        image_id = f"{card.name}/{path.relative_to(images).as_posix()}"
        rows.append((image_id, path, label, texts))
    for name in ("download", "split", "propose"):
        (output / name).mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(shards.chunks(rows, IMAGES_PER_SHARD)):
        pictures = [_picture(image_id, path, label) for image_id, path, label, _ in part]
        schema = schemas.images(card.classes)
        shards.write(shards.shard_path(output / "download", "images", index), pictures, schema)
        rollouts = [
            {"image_id": image_id, "rollout": number, "completion": text, "finish_reason": "stop"}
            for image_id, _, _, texts in part
            for number, text in enumerate(texts)
        ]
        path = shards.shard_path(output / "propose", "rollouts", index)
        shards.write(path, rollouts, schemas.rollouts())
    split_rows = [
        {
            "image_id": image_id,
            "label": label,
            "class_name": card.classes[label] if label >= 0 else "",
            "group": "base",
            "split": "train",
        }
        for image_id, _, label, _ in rows
    ]
    shards.write(output / "split" / "split.parquet", split_rows, schemas.split(card.classes))
    return {"images": len(rows), "rollouts": sum(len(texts) for *_, texts in rows)}


def configuration(card: Card, output: Path, settings: Path) -> Row:
    """BuildMCQ's configuration for imported rollouts, with the settings of the luigi.cfg `settings`."""
    config = ConfigParser(interpolation=None)
    if not config.read(settings) or not config.has_section("BuildMCQ"):
        raise StageError(f"{settings} has no [BuildMCQ] section; run this in the project's folder")
    own = {key: _value(text) for key, text in config["BuildMCQ"].items()}
    return {
        "output": str(output / "build_mcq"),
        "card": card.name,
        **{name: str(output / name) for name in ("download", "split", "propose")},
        "prompt_style": config["engine"]["prompt_style"],
        **own,
        "seed": int(config["run"]["seed"]),
    }


def export_questions(mcq: Path, style: str, output: Path) -> int:
    """Write the question shards of `mcq` in another trainer's format. Returns the question count.

    Raises StageError for an unknown format.
    """
    if style not in FORMATS:
        raise StageError(f"--format must be one of {', '.join(FORMATS)}; got {style!r}")
    features, convert = FORMATS[style]
    output.mkdir(parents=True, exist_ok=True)
    count = 0
    for index, path in enumerate(shards.paths(mcq, "mcq")):
        asked = [row for batch in shards.iter_batches(path, None, 256) for row in batch.to_pylist()]
        rows = [convert(row, count + number) for number, row in enumerate(asked)]
        shards.write(shards.shard_path(output, "train", index), rows, features.arrow_schema)
        count += len(rows)
    return count


def read_exported(folder: Path, style: str) -> Iterator[Row]:
    """Rows of exported shards in our columns: image (bytes, path), question, options, answer_letter."""
    for row in shards.iter_rows(folder, "train"):
        if style == "visual_rft":
            image, question, answer = row["image"], row["problem"], row["solution"]
        elif style == "easyr1":
            image, question, answer = row["images"][0], row["problem"], row["answer"]
        else:
            image, question = row["images"][0], row["prompt"][0]["content"]
            answer = row["reward_model"]["ground_truth"]
        question = question.removeprefix(PLACEHOLDER)
        lines = re.findall(r"^[A-Z]\. (.+)$", question, re.MULTILINE)
        letter = re.sub(r"</?answer>", "", answer)
        yield {"image": image, "question": question, "options": lines, "answer_letter": letter}


def _visual_rft(row: Row, _: int) -> Row:
    return {
        "image": row["image"],
        "problem": row["question"],
        "solution": f"<answer>{row['answer_letter']}</answer>",
    }


def _easyr1(row: Row, _: int) -> Row:
    return {
        "images": [row["image"]],
        "problem": PLACEHOLDER + row["question"],
        "answer": row["answer_letter"],
    }


def _verl(row: Row, number: int) -> Row:
    return {
        "data_source": row["image_id"].split("/")[0],
        "prompt": [{"role": "user", "content": PLACEHOLDER + row["question"]}],
        "images": [row["image"]],
        "ability": "fine_grained_recognition",
        "reward_model": {"style": "rule", "ground_truth": row["answer_letter"]},
        "extra_info": {"index": number, "split": "train", "mcq_id": row["mcq_id"]},
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
                "extra_info": {"index": Value("int64"), "split": STR, "mcq_id": STR},
            }
        ),
        _verl,
    ),
}


def _read_json(file: Path) -> dict[str, Row]:
    try:
        answers = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise StageError(f"cannot read {file}: {error}") from error
    if not isinstance(answers, dict) or not answers:
        raise StageError(f"{file} must map each image to its answers, and name at least one image")
    return answers


def _completions(file: Path, key: str, entry: Any) -> list[str]:
    """The answers of an image as completions that the parser reads."""
    if isinstance(entry, dict) and isinstance(entry.get("completions"), list):
        return [str(text) for text in entry["completions"]]
    counts = entry.get("predictions") if isinstance(entry, dict) else None
    fits = isinstance(counts, dict) and all(type(n) is int and n >= 0 for n in counts.values())
    if not fits or not counts:
        raise StageError(
            f"{file}: {key!r} needs predictions, which map names to counts, or completions, a list"
        )
    return [prompts.completion("", name) for name in counts for _ in range(counts[name])]


def _find_images(answers: dict[str, Row], folder: Path) -> dict[str, Path]:
    """Key of an answer -> its image file below `folder`."""
    files = [p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file()]
    known: dict[str, list[Path]] = {}
    for path in sorted(files):
        relative = path.relative_to(folder)
        for name in {
            relative.as_posix(),
            relative.with_suffix("").as_posix(),
            path.name,
            path.stem,
        }:
            known.setdefault(name, []).append(path)
    path_of: dict[str, Path] = {}
    for key in answers:
        exact = folder / key
        if exact in known.get(key, []):
            path_of[key] = exact
            continue
        matches = known.get(key) or known.get(Path(key).name) or []
        if len(matches) != 1:
            problem = "is not there" if not matches else f"may be {matches[0]} or {matches[1]}"
            raise StageError(f"image {key!r} {problem}; name it by its path below {folder}")
        path_of[key] = matches[0]
    owners: dict[Path, str] = {}
    for key, path in path_of.items():
        if owners.setdefault(path, key) != key:
            raise StageError(f"{owners[path]!r} and {key!r} are the same image, {path}")
    return path_of


def _picture(image_id: str, path: Path, label: int) -> Row:
    try:
        picture = normalise_image(path.read_bytes())
    except (OSError, Reject) as error:
        raise StageError(f"{path} cannot be read as an image: {error}") from error
    return image_row(image_id, image_id, label, "train", picture)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m tasks.exchange export artifacts/beetles/dive_k/round0/build_mcq/"
        "current --format easyr1 --output questions",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    taking = commands.add_parser("import", help="a JSON file of answers to BuildMCQ's tables")
    taking.add_argument("file", type=Path, metavar="FILE.json")
    taking.add_argument("--card", required=True, help="the data card that names the classes")
    taking.add_argument("--images", type=Path, required=True, help="the folder of the images")
    giving = commands.add_parser("export", help="question shards to another trainer's format")
    giving.add_argument("shards", type=Path, help="a build_mcq artifact's folder")
    giving.add_argument("--format", required=True, help=", ".join(FORMATS))
    for command in (taking, giving):
        command.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.command == "export":
            count = export_questions(arguments.shards, arguments.format, arguments.output)
            print(f"exchange: {count} questions in {arguments.output}, for {arguments.format}")
            return
        card = load(arguments.card)
        config = configuration(card, arguments.output, Path("luigi.cfg"))
        counts = import_rollouts(arguments.file, card, arguments.images, arguments.output)
        path = arguments.output / "build_mcq.json"
        path.write_text(json.dumps(config, indent=1), encoding="utf-8")
        print(
            f"exchange: {counts['rollouts']} rollouts of {counts['images']} images in "
            f"{arguments.output}; now run: python -m tasks.build_mcq {path}"
        )
    except (StageError, CardError, ShardError) as error:
        sys.exit(f"exchange: {error}")


if __name__ == "__main__":
    main()
