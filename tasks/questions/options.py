"""Chooses the options of a question from an image's candidates, and their order.

The rules that depart from the method's first implementation:

- an absent truth replaces the candidate with the fewest votes, and the row records it;
- too few options are topped up with the classes that this policy confuses with the truth most often;
- among a shard's questions with n options, each letter is right equally often, within one.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tasks.language.fuzzy import text_neighbours
from tasks.questions.votes import Candidate, Merged

REMEMBERED = 1000  # classes whose neighbours are kept: each list is as long as the list of classes


class Option(NamedTuple):
    """One option of a question; `source` is one of `tasks.tables.schemas.SOURCES`.

    A name that is no class has class id -1 and its spelling in `name`.
    """

    class_id: int
    votes: int
    source: str
    name: str = ""


class Neighbours:
    """The other base classes by nearness to a class: by confusion with it, or by similar names.

    `confused[truth]` counts how often this policy proposed each class for images of `truth`.
    """

    def __init__(
        self, names: Sequence[str], base: Sequence[int], confused: Mapping[int, Counter[int]]
    ):
        self._names, self._base, self.confused = names, base, confused
        self._found: dict[tuple[str, int], list[int]] = {}

    def of(self, kind: str, truth: int) -> list[int]:
        """All base classes but `truth`, nearest first; `kind` is confusion or text."""
        key = (kind, truth)
        if key not in self._found:
            if len(self._found) >= REMEMBERED:
                self._found.clear()
            counts = self.confused.get(truth, Counter())
            self._found[key] = (
                text_neighbours(self._names, truth, self._base)
                if kind == "text"
                else sorted((c for c in self._base if c != truth), key=lambda c: (-counts[c], c))
            )
        return self._found[key]


def count_confusions(counts: dict[int, Counter[int]], block: Merged, truths: Sequence[int]) -> None:
    """Add a block's votes to `counts[truth][proposed class]`.

    `truths` has one class id for each image of the block, below 0 where the truth is unknown.
    """
    truth = np.repeat(np.asarray(truths, np.int64), np.diff(block.starts))
    used = (truth >= 0) & (block.class_ids >= 0)
    if not used.any():
        return
    width = int(block.class_ids.max()) + 1
    pairs, inverse = np.unique(truth[used] * width + block.class_ids[used], return_inverse=True)
    sums = np.bincount(inverse, block.votes[used]).astype(int)
    for pair, votes in zip(pairs.tolist(), sums.tolist(), strict=True):
        counts.setdefault(pair // width, Counter())[pair % width] += votes


def choose_options(
    candidates: Sequence[Candidate],
    truth: int,
    *,
    num_options: int,
    min_options: int,
    top_up: str,
    confusion: Sequence[int],
    generator: np.random.Generator | None,
    text: Sequence[int] = (),
    options_from: str = "policy",
    min_truth_votes: int = 0,
) -> tuple[list[Option], str]:
    """The options of one question by falling votes, truth included, and the outcome.

    `confusion` and `text` list the other base classes: those most often confused with the truth
    first, and those with the most similar names first. Options drawn at random need `generator`.
    """
    if not candidates:
        return [], "no_candidates"
    if len(candidates) == 1 and candidates[0].class_id == truth:
        return [], "truth_only"
    votes = next((c.votes for c in candidates if c.class_id == truth), 0)
    if votes < min_truth_votes:
        return [], "truth_rarely_proposed"
    options = [Option(c.class_id, c.votes, "policy", c.name) for c in candidates[:num_options]]
    if not any(option.class_id == truth for option in options):
        # If there is no room, the truth replaces the last candidate, which has the fewest votes.
        options = [*options[: num_options - 1], Option(truth, votes, "truth")]
    if top_up != "none" and len(options) < min_options:
        pool = list(text if top_up == "text" else confusion)
        if top_up == "random":
            pool = _shuffled(pool, generator)
        taken = {option.class_id for option in options}
        spare = [class_id for class_id in pool if class_id not in taken]
        options += [Option(c, 0, "top_up") for c in spare[: min_options - len(options)]]
    if options_from != "policy":
        pools = {"random": confusion, "text": text, "hard_negative": confusion}
        pool = list(pools[options_from])
        if options_from == "random":
            pool = _shuffled(pool, generator)
        options = _replaced(options, truth, pool, options_from, candidates)
    return (options, "kept") if len(options) >= 2 else (options, "too_few_options")


def shuffle_options(
    options: Sequence[Option],
    generator: np.random.Generator,
    truth_at: int | None = None,
    truth: int = -1,
) -> list[Option]:
    """Options in random order; with `truth_at` the truth stands at that position."""
    order = [options[i] for i in generator.permutation(len(options))]
    if truth_at is None:
        return order
    rest = [option for option in order if option.class_id != truth]
    right = next(option for option in order if option.class_id == truth)
    return [*rest[:truth_at], right, *rest[truth_at:]]


def balanced_letters(counts: Sequence[int], generator: np.random.Generator) -> list[int]:
    """The truth's position in each question, given the questions' option counts.

    Among the questions with n options, each of the n positions is used equally often, within one.
    """
    positions = [0] * len(counts)
    for n in sorted(set(counts)):
        questions = [i for i, count in enumerate(counts) if count == n]
        deck = np.concatenate([generator.permutation(n) for _ in range(len(questions) // n + 1)])
        # The remainder goes to random letters, so that the first ones are not favoured.
        for question, position in zip(generator.permutation(questions), deck, strict=False):
            positions[int(question)] = int(position)
    return positions


def mcq_id(image_id: str, class_ids: Iterable[int], names: Iterable[str] = ()) -> str:
    """A question's id: a hash of the image id and the set of its options, whatever their order.

    `names` are the options that are no class.
    """
    text = image_id + "|" + ",".join(map(str, sorted(class_ids)))
    text += "".join(f"|{name}" for name in sorted(names))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _replaced(
    options: Sequence[Option],
    truth: int,
    pool: Sequence[int],
    source: str,
    candidates: Sequence[Candidate],
) -> list[Option]:
    """The same question with its wrong options taken from `pool`, for an ablation.

    The ablation then asks about the same images with equally many options, and differs from DiVE-k
    in its wrong options alone.
    """
    votes = {c.class_id: c.votes for c in candidates}
    others = [Option(c, votes.get(c, 0), source) for c in pool[: len(options) - 1]]
    return [next(o for o in options if o.class_id == truth), *others]


def _shuffled(pool: Sequence[int], generator: np.random.Generator | None) -> list[int]:
    if generator is None:
        raise ValueError("options drawn at random need a generator")
    return [pool[i] for i in generator.permutation(len(pool))]
