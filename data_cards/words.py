"""The words of a card: clean class names, and the field guide that says how classes look."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any


def clean_name(text: str) -> str:
    """A class name as prompts show it: NFKC, single spaces, no punctuation at its end."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(" .,;:!?")


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the words, in any case; the longest one where several begin alike."""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE)


def field_guide(front: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """The keys `taxonomy`, `descriptions` and `traits` of a card's front matter, checked.

    Raises ValueError that names the key and what is wrong with it.
    """
    descriptions = _descriptions(front.get("descriptions") or {}, classes)
    return {
        "taxonomy": _taxonomy(front.get("taxonomy") or {}, classes),
        "descriptions": descriptions,
        "traits": _traits(front.get("traits") or {}, descriptions, classes),
    }


def _taxonomy(groups: Any, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    if not isinstance(groups, dict) or not all(
        isinstance(names, list) for names in groups.values()
    ):
        raise ValueError("taxonomy must map a group, such as a genus, to a list of classes")
    by_group = {
        str(group): tuple(clean_name(str(n)) for n in names) for group, names in groups.items()
    }
    seen: set[str] = set()
    for group, names in by_group.items():
        for name in names:
            if name not in classes:
                raise ValueError(
                    f"taxonomy has {name!r} in {group!r}, which is not among the classes"
                )
            if name in seen:
                raise ValueError(f"taxonomy names the class {name!r} twice")
            seen.add(name)
    return by_group


def _descriptions(texts: Any, classes: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(texts, dict):
        raise ValueError("descriptions must map a class name to a text")
    texts_by_class = {}
    for name, text in texts.items():
        if clean_name(str(name)) not in classes:
            raise ValueError(f"descriptions names {name!r}, which is not among the classes")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the description of {name!r} must be a text")
        texts_by_class[clean_name(str(name))] = " ".join(text.split())
    return texts_by_class


def _traits(
    traits: Any, descriptions: dict[str, str], classes: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The words by trait; each class's description must hold exactly one word of each trait."""
    if not isinstance(traits, dict) or not all(
        isinstance(words, list) for words in traits.values()
    ):
        raise ValueError("traits must map a trait to a list of words")
    by_trait = {str(trait): tuple(map(str, words)) for trait, words in traits.items()}
    for name in classes if by_trait else ():
        for trait, words in by_trait.items():
            if (count := len(any_of(words).findall(descriptions.get(name, "")))) != 1:
                raise ValueError(
                    f"the description of {name!r} must have one word of the trait {trait!r} "
                    f"({', '.join(words)}), and it has {count}"
                )
    return by_trait
