"""String similarity of names: for the last step of matching, and for options that look alike.

Similarity is rapidfuzz's `ratio` of normalised names, from 0 to 100 (equal): the percentage of
characters that need not be inserted or deleted to turn one name into the other.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from tasks.language.words import normalize


class FuzzyNames:
    """Matches misspelt class names: the last step of `tasks.language.class_names.ClassNames`.

    `spellings` maps normalised names and aliases to class ids. A text matches a class when its
    similarity to one of the class's spellings is at least `threshold` and exceeds that to every
    other class by `margin` or more. Classes that are as similar as `threshold` to another class are
    never matched this way, nor are names whose numbers differ: "737-200" is no misspelt "737-300".
    """

    def __init__(self, spellings: Mapping[str, int], threshold: float, margin: float):
        if not 0 < threshold <= 100 or margin < 0:
            raise ValueError(
                f"fuzzy_threshold must be from 0 to 100 and fuzzy_margin at least 0; got "
                f"{threshold:g} and {margin:g}"
            )
        self._keys = list(spellings)
        self._ids = [spellings[key] for key in self._keys]
        self._threshold, self._margin = threshold, margin
        self._alike = self._too_alike()

    def match(self, key: str) -> int | None:
        """The id of the class that the normalised text `key` misspells, or None."""
        from rapidfuzz import fuzz, process  # its import takes tens of ms, and few runs need it

        floor = max(0.0, self._threshold - self._margin)
        near = process.extract(key, self._keys, scorer=fuzz.ratio, limit=None, score_cutoff=floor)
        best: dict[int, float] = {}
        for spelling, score, index in near:
            class_id = self._ids[index]
            if score > best.get(class_id, -1.0) and _numbers(spelling) == _numbers(key):
                best[class_id] = score
        ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))
        if not ranked or ranked[0][1] < self._threshold or ranked[0][0] in self._alike:
            return None
        if len(ranked) > 1 and ranked[0][1] - ranked[1][1] < self._margin:
            return None
        return ranked[0][0]

    def _too_alike(self) -> set[int]:
        """The classes with a spelling that is within `threshold` of another class's spelling."""
        from rapidfuzz import fuzz, process

        alike: set[int] = set()
        for key, class_id in zip(self._keys, self._ids, strict=True):
            near = process.extract(
                key, self._keys, scorer=fuzz.ratio, limit=None, score_cutoff=self._threshold
            )
            alike.update(self._ids[index] for *_, index in near if self._ids[index] != class_id)
        return alike


def text_neighbours(names: Sequence[str], class_id: int, among: Sequence[int]) -> list[int]:
    """The classes of `among` but `class_id`, by falling similarity of their names to its name.

    The order of words is ignored. Equally similar classes stand by ascending id.
    """
    import numpy as np
    from rapidfuzz import fuzz, process

    keys = _sorted_words(tuple(names))
    others = np.array([other for other in among if other != class_id], int)
    compared = [keys[other] for other in others]
    scores = process.cdist([keys[class_id]], compared, scorer=fuzz.ratio, dtype=np.float64)[0]
    return [int(other) for other in others[np.lexsort((others, -scores))]]


@lru_cache(maxsize=4)  # with thousands of classes, to normalise all for each one takes an hour
def _sorted_words(names: tuple[str, ...]) -> list[str]:
    return [" ".join(sorted(normalize(name).split())) for name in names]


def _numbers(key: str) -> list[str]:
    return [word for word in key.split() if any(char.isdigit() for char in word)]
