"""What the method's first implementation loses, by its rules as described, on the same rollouts.

Re-implemented from a description of the rules, not from the code: votes are counted by the answer
as it is spelled; the five most voted spellings are cut before anything is looked up; names that
are not in the list of training classes, compared by lower case, are dropped then; the truth is
added when no spelling equals it, in place of any option where there is no room; one wrong
candidate alone is topped up with two random training classes; letters are drawn at random.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tasks.language.class_names import ClassNames

CUT = 5


@dataclass
class Losses:
    """Counts over images, and `letter_spread` as `spread` gives it."""

    images: int = 0
    questions: int = 0
    truth_thought_absent: int = 0
    duplicate_options: int = 0
    lost_candidates: int = 0
    candidates: int = 0
    letter_spread: float = 0.0


def official_rules(
    answers: Mapping[str, list[str]],
    truths: Mapping[str, int],
    names: ClassNames,
    base: Iterable[int],
    seed: int,
) -> Losses:
    """Questions by the official rules, compared with what the same answers mean class by class.

    `answers` holds the texts of the readable answers by image id.
    """
    allowed = sorted(base)
    listed = {names.names[c].lower(): c for c in allowed}
    rng = np.random.default_rng(seed)
    losses, letters = Losses(), Counter[tuple[int, int]]()
    for image_id, texts in answers.items():
        truth = names.names[truths[image_id]]
        meant = (names.match(text).class_id for text in texts)
        votes = Counter(class_id for class_id in meant if class_id in allowed)
        found = {class_id for class_id, _ in votes.most_common(CUT)}
        top = [text for text, _ in Counter(texts).most_common(CUT)]
        options = list(dict.fromkeys(text for text in top if text.lower() in listed))
        losses.images += 1
        losses.candidates += len(found)
        kept = {names.match(text).class_id for text in options}
        losses.lost_candidates += len(found - kept)
        absent = truth not in options
        losses.truth_thought_absent += absent and truths[image_id] in found
        if absent:
            if len(options) >= CUT:
                options[rng.integers(len(options))] = truth
            else:
                options.append(truth)
        if len(options) == 2:
            options += [names.names[allowed[i]] for i in rng.integers(0, len(allowed), 2)]
        if len(options) < 2:
            continue
        rng.shuffle(options)
        classes = [names.match(text).class_id for text in options]
        losses.questions += 1
        losses.duplicate_options += len(set(classes)) < len(classes)
        letters[len(options), options.index(truth)] += 1
    losses.letter_spread = spread(letters)
    return losses


def spread(letters: Counter[tuple[int, int]]) -> float:
    """Questions by which the most used letter exceeds the least used one, beyond the one that
    cannot be avoided, as a share of all; `letters` counts by (number of options, place)."""
    surplus = 0
    for size in {size for size, _ in letters}:
        used = [letters[size, place] for place in range(size)]
        surplus += max(0, max(used) - min(used) - 1)
    return surplus / max(1, letters.total())
