"""Which images a policy was trained on, and how often the answer it was trained on is not the label.

Training without labels (the methods `ttrv` and `dive_k_majority`) takes the policy's majority vote for
the truth. Where the images have labels after all, the share of wrong votes can be counted afterwards.
It may also have seen images that it is then measured on, which every figure must be read with.
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_cards import Card
from tasks.language.answers import parse
from tasks.language.prompts import LETTERS
from tasks.language.vocabulary import OPEN, Vocabulary
from tasks.tables import shards, split_table
from tasks.tables.manifest import read_values

Counts = dict[str, dict[str, int]]


def trained_images(folders: Sequence[str]) -> set[str]:
    """The ids of the images that a policy was trained on, from the folders of its BuildMCQ and Train stages.

    Those of its questions, and of these only the ones with a completion. Supervised training has none,
    and may have seen all.
    """
    asked = _image_ids(folders, "mcq")
    return asked & (_image_ids(folders, "completions") or asked)


def _image_ids(folders: Iterable[str], table: str) -> set[str]:
    return {
        image_id
        for folder in folders
        for path in sorted(Path(folder).glob(f"{table}-*.parquet"))
        for image_id in shards.read_file(path, ["image_id"])["image_id"].to_pylist()
    }


def seen(folders: Sequence[str], evaluate: str, split: str) -> Counter[str]:
    """How many images a policy was trained on: `evaluated` ones, and `novel` ones of novel classes.

    The arguments are folders: those of its BuildMCQ and Train stages, of its evaluation, and of the
    split. Both counts are 0 in training on base train images.
    """
    trained = trained_images(folders)
    if not trained:
        return Counter()
    evaluated = shards.read(Path(evaluate), "predictions", ["image_id"])["image_id"].to_pylist()
    groups = split_table.groups(Path(split))
    novel = sum(groups.get(image_id) == "novel" for image_id in trained)
    return Counter(evaluated=len(trained.intersection(evaluated)), novel=novel)


def pseudo_labels(
    entry: Mapping[str, Any], split_rows: Mapping[str, Mapping[str, Any]], card: Card
) -> Counts:
    """How often the majority vote that a round was trained on is not the image's label.

    The result has, over `all` questions and by group, `questions` (with a label), `wrong`, and `none`
    (no vote could be read). It is empty for a round that was trained on labels. With questions frozen
    from majority votes each of them counts once. With votes taken in training each group of
    completions counts, whenever it was sampled. `entry` holds the round's folders `build_mcq` and
    `train`, and `split_rows` are Split's rows by image id.
    """
    if not (entry.get("build_mcq") and entry.get("train")):
        return {}
    build_mcq, train = Path(entry["build_mcq"]), Path(entry["train"])
    settings = _settings(build_mcq)
    votes: Iterable[tuple[str, int | None]]
    if settings.get("answer_from") == "majority" and "unlabelled_groups" not in settings:
        votes = _frozen(build_mcq)
    elif "unlabelled_groups" in settings:
        reading = (_settings(train).get("reading") or {}).get(card.name, {})
        votes = _sampled(train, Vocabulary.of(card, reading), split_rows)
    else:
        return {}
    counts: Counts = {}
    for image_id, vote in votes:
        row = split_rows.get(image_id)
        if row is None or row["label"] is None or row["label"] < 0:
            continue
        for group in ("all", row["group"]):
            own = counts.setdefault(group, {"questions": 0, "wrong": 0, "none": 0})
            own["questions"] += 1
            own["none"] += vote is None
            own["wrong"] += vote is not None and vote != row["label"]
    return counts


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return read_values(path).get("settings", {}) if path.exists() else {}


def _frozen(build_mcq: Path) -> Iterable[tuple[str, int]]:
    """(image id, answer's class id) of each frozen question."""
    columns = ["image_id", "option_class_ids", "answer_letter"]
    for path in sorted(build_mcq.glob("mcq-*.parquet")):
        for row in shards.read_file(path, columns).to_pylist():
            yield row["image_id"], row["option_class_ids"][LETTERS.index(row["answer_letter"])]


def _sampled(
    train: Path, vocabulary: Vocabulary, wanted: Container[str]
) -> Iterable[tuple[str, int | None]]:
    """(image id, class id of the majority vote) of each group of completions about a `wanted` image.

    The class id is below 0 for a name that is no class, and None where nothing could be read. A tie
    goes to the lowest class id.
    """
    groups: dict[tuple[int, str], Counter[tuple[int, str]]] = defaultdict(Counter)
    for row in shards.iter_rows(train, "completions", ["step", "image_id", "completion"]):
        if row["image_id"] in wanted:
            votes = groups[row["step"], row["image_id"]]
            answer = parse(row["completion"]).answer
            class_id, _, name = vocabulary.read(answer) if answer is not None else (OPEN, "", "")
            if class_id >= 0 or name:
                votes[class_id, name] += 1
    for (_, image_id), votes in groups.items():
        ranked = sorted(votes, key=lambda key: (-votes[key], key[0] < 0, key))
        yield image_id, ranked[0][0] if ranked else None
