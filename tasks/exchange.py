"""Imports rollouts of other programs for BuildMCQ, and exports questions to other trainers.

    python -m tasks.exchange import answers.json --card cub --images FOLDER --output imported
    python -m tasks.build_mcq imported/build_mcq.json
    python -m tasks.exchange export SHARDS --format visual_rft --output FOLDER

`import` reads the official code's JSON, `{image: {"groundtruth": name, "predictions": {name:
count}}}`. Predictions may also be a list of names, and so may a whole entry; in place of predictions
an image may have `"completions": [text, ...]`. An image without any has 0 rollouts, and is counted.
It writes the tables that BuildMCQ reads, and its configuration with the settings of luigi.cfg.
`export` writes what Visual-RFT, the official trainer, EasyR1 and verl read; --help says what each
needs.
"""

import argparse
import json
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from data_cards import Card, CardError, load
from tasks.ingest.pictures import Reject, image_row, normalise_image
from tasks.language import prompts
from tasks.language.class_names import ClassNames
from tasks.questions.exchange_formats import FORMATS, NEEDS, export_questions, require_empty
from tasks.runtime.errors import ShardError, StageError
from tasks.runtime.settings import json_or_text
from tasks.tables import schemas, shards

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGES_PER_SHARD = 500
Row = dict[str, Any]


def import_rollouts(file: Path, card: Card, images: Path, output: Path) -> dict[str, int]:
    """Write `download/`, `split/` and `propose/` below `output` from a JSON file of answers.

    The file names an image by its path below `images`, by a longer path that ends in it, or by a file
    name that occurs there once; the suffix may be missing. Its image id is `<card>/<path>`. The
    classes that occur as ground truth are the ones offered. Returns the counts of images, of rollouts,
    and of images without any. Raises StageError for a file of another form or without any rollout, an
    image that is missing or ambiguous, a ground truth that is no class of the card, and an `output` that
    holds files already.
    """
    answers = _read_json(file)
    names = ClassNames.of(card)
    files = _find_images(answers, images)
    rows = []
    for key, path in sorted(files.items(), key=lambda item: item[1].as_posix()):
        texts = _completions(file, key, answers[key])  # first, because it checks the entry's form
        entry = answers[key]
        truth = entry.get("groundtruth") if isinstance(entry, dict) else None
        label = -1 if truth is None else names.match(str(truth)).class_id
        if label is None:
            raise StageError(
                f"{file}: the ground truth of {key!r}, {truth!r}, is no class of the card "
                f"{card.name}; add it there as an alias"
            )
        image_id = f"{card.name}/{path.relative_to(images).as_posix()}"
        rows.append((image_id, path, label, texts))
    empty = [image_id for image_id, *_, texts in rows if not texts]
    if len(empty) == len(rows):
        raise StageError(
            f"{file}: no image has an answer; an entry needs predictions (names, or names with "
            "counts) or completions"
        )
    require_empty(output)
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
    if empty:
        lost = [{"image_id": image_id, "reason": f"no answer in {file}"} for image_id in empty]
        shards.write(output / "propose" / "rollouts_refused.parquet", lost, schemas.refused())
        print(f"exchange: {len(empty)} images have no answers, the first: {empty[0]}")
    total = sum(len(texts) for *_, texts in rows)
    return {"images": len(rows), "rollouts": total, "images_without_rollouts": len(empty)}


def configuration(card: Card, output: Path, settings: Path) -> Row:
    """BuildMCQ's configuration for imported rollouts, with the settings of the luigi.cfg `settings`."""
    config = ConfigParser(interpolation=None)
    if not config.read(settings) or not config.has_section("BuildMCQ"):
        raise StageError(f"{settings} has no [BuildMCQ] section; run this in the project's folder")
    own = {key: json_or_text(text) for key, text in config["BuildMCQ"].items()}
    return {
        "output": str(output / "build_mcq"),
        "card": card.name,
        **{name: str(output / name) for name in ("download", "split", "propose")},
        "prompt_style": config["engine"]["prompt_style"],
        **own,
        "seed": int(config["run"]["seed"]),
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
    """The answers of an image as completions that the parser reads; empty where it has none."""
    entry = entry if isinstance(entry, dict) else {"predictions": entry}
    texts = entry.get("completions")
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return texts
    given = entry.get("predictions") or []
    counted = isinstance(given, dict) and all(type(n) is int and n >= 0 for n in given.values())
    listed = isinstance(given, list) and all(isinstance(name, str) for name in given)
    if texts is not None or not (counted or listed):
        raise StageError(
            f"{file}: {key!r} needs predictions, a list of names or names with their counts, or "
            "completions, a list of texts"
        )
    names = [name for name in given for _ in range(given[name])] if counted else given
    return [prompts.completion("", name) for name in names]


def _find_images(answers: dict[str, Row], folder: Path) -> dict[str, Path]:
    """Key of an answer -> its image file below `folder`: the one that shares the longest end with it."""
    files = [p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file()]
    known: dict[str, list[Path]] = {}
    for path in sorted(files):
        relative = path.relative_to(folder)
        for whole in (relative, relative.with_suffix("")):
            for end in _ends(whole.as_posix()):
                known.setdefault(end, []).append(path)
    path_of: dict[str, Path] = {}
    for key in answers:
        matches = next((known[end] for end in _ends(key) if end in known), [])
        exact = [path for path in matches if path.relative_to(folder).as_posix() in _ends(key)]
        matches = exact[:1] if len(exact) == 1 else matches
        if len(matches) != 1:
            problem = "is not there" if not matches else f"may be {matches[0]} or {matches[1]}"
            raise StageError(f"image {key!r} {problem}; name it by its path below {folder}")
        path_of[key] = matches[0]
    owners: dict[Path, str] = {}
    for key, path in path_of.items():
        if owners.setdefault(path, key) != key:
            raise StageError(f"{owners[path]!r} and {key!r} are the same image, {path}")
    return path_of


def _ends(path: str) -> list[str]:
    """The ends of `../a/b.jpg`, longest first: `a/b.jpg` and `b.jpg`."""
    pieces = [piece for piece in path.replace("\\", "/").split("/") if piece not in ("", ".", "..")]
    return ["/".join(pieces[start:]) for start in range(len(pieces))]


def _picture(image_id: str, path: Path, label: int) -> Row:
    try:
        picture = normalise_image(path.read_bytes())
    except (OSError, Reject) as error:
        raise StageError(f"{path} cannot be read as an image: {error}") from error
    return image_row(image_id, image_id, label, "train", picture)


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
    giving = commands.add_parser(
        "export",
        help="question shards to another trainer's format",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats, and what their readers need:\n\n{NEEDS}",
    )
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
