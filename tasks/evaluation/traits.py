"""Reads a policy's descriptions: which traits of a card its completions name, rightly or wrongly.

A card with `traits` and `descriptions` says in words how each class looks. Of a completion, the first
word of each trait counts, since reasoning over options repeats the words of other classes later.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_cards import Card, any_of
from tasks.evaluation import metrics
from tasks.tables.schemas import GROUPS

ALL = "all of them"  # the row that counts images whose every trait was read rightly
SEED = 0  # of the bootstrap: the same artifacts give the same figures


def first_words(text: str, traits: Mapping[str, Sequence[str]]) -> dict[str, re.Match[str]]:
    """Trait -> the first of its words in `text`; a trait that is not mentioned is left out."""
    matches = {trait: any_of(words).search(text) for trait, words in traits.items()}
    return {trait: match for trait, match in matches.items() if match}


def read_rightly(text: str, class_name: str, card: Card) -> dict[str, bool]:
    """Trait -> whether `text` names the word of this class; ALL -> whether that holds for all."""
    look, words = card.look(class_name), first_words(text, card.traits)
    right = {
        trait: trait in words and words[trait].group().lower() == word
        for trait, word in look.items()
    }
    return right | {ALL: all(right.values())}


def table(predictions: Sequence[list[dict]], card: Card) -> dict[str, Any]:
    """The share of images whose traits are read rightly, before and after training.

    `predictions` are the rows of one or two evaluations of the same images. Result: `mode`, `images`,
    and `rows` with `trait`, `shares` (one for each evaluation) and, of two, `change`: the paired
    difference as mean and 95 % interval. Empty where the card lists no traits. An image whose
    completion does not mention a trait counts as wrong.
    """
    if not card.traits or not predictions[0]:
        return {}
    modes = {row["mode"] for row in predictions[0]}
    mode = "one_step" if "one_step" in modes else predictions[0][0]["mode"]
    flags = [_flags(rows, mode, card) for rows in predictions]
    rows = []
    for trait in (*card.traits, ALL):
        right = [[image[trait] for image in images] for images in flags]
        row: dict[str, Any] = {"trait": trait, "shares": [sum(r) / len(r) for r in right]}
        if len(right) == 2:
            mean, low, high = metrics.paired_difference(*right, seed=SEED)
            row["change"] = {"mean": mean, "interval": [low, high]}
        rows.append(row)
    return {"mode": mode, "images": len(flags[0]), "rows": rows}


def _flags(rows: list[dict], mode: str, card: Card) -> list[dict[str, bool]]:
    """What was read rightly of each image, by ascending image id."""
    of_mode = [row for row in rows if row["mode"] == mode and row["group"] in GROUPS]
    return [
        read_rightly(row["completion"], card.classes[row["label"]], card)
        for row in sorted(of_mode, key=lambda row: row["image_id"])
    ]
