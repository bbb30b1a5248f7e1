"""The report's gallery: test images that training won or lost, or that stayed wrong, side by side.

Nothing is picked by hand. Within each kind the images stand in the order of a hash of their ids,
base and novel in turn, so that the gallery shows typical cases and not flattering ones.
"""

import base64
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from data_cards import Card
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.pages import marks
from tasks.questions.candidates import merge
from tasks.tables import shards

PAIRED = {
    "won": ("Won", "wrong before, right after"),
    "lost": ("Lost", "right before, wrong after"),
    "wrong": ("Wrong both times", "what is still too hard"),
}
ALONE = {"right": ("Right", "by the base policy"), "wrong": ("Wrong", "by the base policy")}
IN_SIGHT = 3  # images of each kind that are visible at first; a click shows the rest
PIXELS = 304  # a thumbnail's longer side: twice the width shown, for high-resolution screens
SHORT_TEXT = 240  # characters; a longer completion is folded
LONG_TEXT = 6000  # characters of a completion at most
Answers = Mapping[str, dict[str, Any]]  # one image's rows of predictions, by mode


@dataclass(frozen=True)
class Shown:
    """One image of the gallery; `answers` has one entry for each evaluation compared."""

    image_id: str
    kind: str
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Gallery:
    """The images shown, the counts of each kind, and the mode that decides on right and wrong."""

    mode: str
    counts: dict[str, int]
    images: int
    shown: list[Shown]


def choose(predictions: Sequence[list[dict]], size: int) -> Gallery:
    """About `size` images from the first two evaluations, an equal share of each kind."""
    tables = [_by_image(rows) for rows in predictions[:2]]
    modes = set.intersection(*({row["mode"] for row in rows} for rows in predictions[:2]))
    mode = "two_step" if "two_step" in modes else next(m for m in sorted(modes, reverse=True))
    kinds = PAIRED if len(tables) == 2 else ALONE
    by_kind: dict[str, dict[str, list[str]]] = {kind: defaultdict(list) for kind in kinds}
    counts: Counter[str] = Counter()
    for image_id in sorted(tables[0], key=_draw):
        kind = _kind([bool(table[image_id][mode]["correct"]) for table in tables])
        if kind in by_kind:
            counts[kind] += 1
            by_kind[kind][tables[0][image_id][mode]["group"]].append(image_id)
    queues = {kind: _in_turn(groups) for kind, groups in by_kind.items()}
    share = size // len(kinds)
    spare = size - sum(min(share, len(queue)) for queue in queues.values())
    shown = []
    for kind, queue in queues.items():
        extra = min(spare, max(0, len(queue) - share))
        spare -= extra
        for image_id in queue[: share + extra]:
            shown.append(Shown(image_id, kind, tuple(table[image_id] for table in tables)))
    return Gallery(mode, {kind: counts[kind] for kind in kinds}, len(tables[0]), shown)


def gallery_values(
    gallery: Gallery,
    names: Sequence[str],
    images: Mapping[str, bytes],
    votes: Sequence[Mapping[str, Mapping[str, int]]],
    split_rows: Mapping[str, dict],
    card: Card,
) -> dict[str, Any]:
    """The values for the gallery's template.

    Args:
        names: the names of the evaluations compared.
        images: encoded bytes by image id.
        votes: for each evaluation, votes by image id and class name.
        split_rows: rows of the split by image id.
        card: the dataset's card; where it lists traits, the words that decide are marked.
    """
    kinds = PAIRED if len(names) > 1 else ALONE
    shown = []
    for kind, (title, meaning) in kinds.items():
        mine = [item for item in gallery.shown if item.kind == kind]
        cards = [
            {
                "picture": data_uri(images.get(item.image_id)),
                "rest": index >= IN_SIGHT,
                **_card(item, names, votes, split_rows[item.image_id], gallery.mode, card),
            }
            for index, item in enumerate(mine)
        ]
        shown.append(
            {
                "key": kind,
                "title": title,
                "meaning": meaning,
                "total": gallery.counts[kind],
                "cards": cards,
                "hidden": len(cards) - IN_SIGHT,
            }
        )
    filters = _filters([split_rows[item.image_id] for item in gallery.shown], kinds)
    return {"mode": gallery.mode, "images": gallery.images, "filters": filters, "kinds": shown}


def _filters(
    split_rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """The choices of the filters: for class, group and kind, each value with its name."""
    labels = {split_row["label"]: split_row["class_name"] for split_row in split_rows}
    groups = dict.fromkeys(sorted(split_row["group"] for split_row in split_rows))
    return {
        "class": {str(n): labels[n] for n in sorted(labels, key=lambda n: labels[n])},
        "group": {group: f"{group} classes" for group in groups},
        "kind": {kind: title.lower() for kind, (title, _) in kinds.items()},
    }


def sampled_votes(folder: Path, ids: Iterable[str], card: Card) -> dict[str, dict[str, int]]:
    """Image id -> class name -> how many of the image's rollouts named the class."""
    names, everything = ClassNames.of(card), set(range(len(card.classes)))
    sampled: dict[str, list[tuple[str, float]]] = {image_id: [] for image_id in ids}
    if not list(folder.glob("rollouts*.parquet")):
        return {}
    columns = ["image_id", "completion", "mean_logprob"]
    for row in shards.iter_rows(folder, "rollouts", columns, 4096):
        if row["image_id"] in sampled:
            sampled[row["image_id"]].append((row["completion"], row["mean_logprob"] or 0.0))
    return {
        image_id: {
            card.classes[c.class_id]: c.votes for c in merge(rows, names, everything).candidates
        }
        for image_id, rows in sampled.items()
    }


def data_uri(encoded: bytes | None) -> str:
    """A thumbnail of the image as a data: URI, or "" where it cannot be decoded.

    It is always decoded and encoded again, so that nothing but pixels reaches the page.
    """
    try:
        with Image.open(io.BytesIO(encoded or b"")) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    small = max(picture.size) <= PIXELS // 2
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _card(
    item: Shown,
    names: Sequence[str],
    votes: Sequence[Mapping[str, Mapping[str, int]]],
    split_row: Mapping[str, Any],
    mode: str,
    card: Card,
) -> dict[str, Any]:
    truth = split_row["class_name"]
    counted = [by_image.get(item.image_id, {}) for by_image in votes]
    other = marks.rival(
        [answers[mode] for answers in item.answers], truth, counted[-1] if counted else {}, card
    )
    decided_by = marks.deciding(truth, other, card)
    sides = [
        {
            "name": name,
            "answers": [
                _answer(row, of_policy, truth, decided_by, card) for row in answers.values()
            ],
        }
        for name, answers, of_policy in zip(names, item.answers, counted, strict=False)
    ]
    return {
        "truth": truth,
        "decided_by": [
            f"{trait}: {word}, not {card.look(other)[trait]}" for trait, word in decided_by.items()
        ],
        "other": other,
        "label": split_row["label"],
        "group": split_row["group"],
        "path": re.split(r"(?<=[/_])", item.image_id),  # a line may break after each part
        "sides": sides,
    }


def _answer(
    row: Mapping[str, Any],
    votes: Mapping[str, int],
    truth: str,
    decided_by: Mapping[str, str],
    card: Card,
) -> dict[str, Any]:
    """The values for one policy's answer about one image in one mode."""
    named_class = card.classes[row["class_id"]] if row["class_id"] >= 0 else None
    return {
        "mode": row["mode"],
        "correct": row["correct"],
        "chosen": named_class,
        "text": _cut(row["answer"], 80),
        "status": row["status"],
        "options": _options(row["options"] or (), named_class, truth, votes),
        "completion": marks.pieces(_cut(row["completion"], LONG_TEXT), decided_by, card),
        "long": len(row["completion"]) > SHORT_TEXT,
    }


def _options(
    options: Iterable[str], named_class: str | None, truth: str, votes: Mapping[str, int]
) -> list[dict[str, Any]]:
    items = []
    for letter, option in zip(LETTERS, options, strict=False):
        tags = [
            word
            for word, on in (("chosen", option == named_class), ("truth", option == truth))
            if on
        ]
        count = votes.get(option, 0 if votes else None)
        items.append(
            {
                "letter": letter,
                "text": option,
                "tags": ", ".join(tags),
                "picked": option == named_class,
                "votes": "" if count is None else f"{count} vote{'s' * (count != 1)}",
            }
        )
    return items


def _cut(text: str, limit: int) -> str:
    rest = len(text) - limit
    return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"


def _by_image(rows: list[dict]) -> dict[str, dict[str, dict]]:
    table: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        table[row["image_id"]][row["mode"]] = row
    return dict(table)


def _kind(correct: list[bool]) -> str:
    if len(correct) == 1:
        return "right" if correct[0] else "wrong"
    return {(False, True): "won", (True, False): "lost", (False, False): "wrong"}.get(
        (correct[0], correct[1]), "right"
    )


def _in_turn(groups: Mapping[str, list[str]]) -> list[str]:
    """The image ids of all groups, one of each group in turn."""
    rows = zip_longest(*(groups[group] for group in sorted(groups)))
    return [image_id for image_id in chain.from_iterable(rows) if image_id is not None]


def _draw(image_id: str) -> bytes:
    """The sort key that puts images in a random but fixed order."""
    return hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
