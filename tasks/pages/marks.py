"""Marks the words that decide a question: those of the traits in which the truth and its rival differ.

The card must list traits (`data_cards`); on the page of any other card nothing is marked.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from data_cards import Card
from tasks.evaluation.traits import first_words

Answers = Iterable[Mapping[str, Any]]


def rival(answers: Answers, truth: str, votes: Mapping[str, int], card: Card) -> str:
    """The class that an image was taken for, else the option with the most votes beside the truth."""
    options: list[str] = []
    for answer in answers:
        class_id = answer["class_id"]
        if class_id >= 0 and card.classes[class_id] != truth:
            return card.classes[class_id]
        options += answer["options"] or ()
    return max((o for o in options if o != truth), key=lambda o: votes.get(o, 0), default="")


def deciding(truth: str, other: str, card: Card) -> dict[str, str]:
    """Trait -> the truth's word for it, for each trait in which the class `other` differs."""
    if not card.traits or other not in card.classes:
        return {}
    theirs = card.look(other)
    return {trait: word for trait, word in card.look(truth).items() if word != theirs[trait]}


def pieces(text: str, decided_by: Mapping[str, str], card: Card) -> list[tuple[str, str]]:
    """The text cut into (piece, mark): the first word of each deciding trait is right or wrong."""
    words = first_words(text, {trait: card.traits[trait] for trait in decided_by})
    cut, at = [], 0
    for trait, match in sorted(words.items(), key=lambda item: item[1].start()):
        mark = "right" if match.group().lower() == decided_by[trait] else "wrong"
        cut += [(text[at : match.start()], ""), (match.group(), mark)]
        at = match.end()
    return [(piece, mark) for piece, mark in (*cut, (text[at:], "")) if piece]
