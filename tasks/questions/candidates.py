"""Merges the rollouts of each image into candidates: one ranked list of classes with their votes.

Votes merge by class before anything is cut off, so spelling variants never split a class's votes.
Candidates stand by falling votes. Ties break by mean log-probability, then by class id, so the order
of rollouts never matters. Every distinct answer is read and matched once a block.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.language import answers
from tasks.language.class_names import ClassNames
from tasks.language.vocabulary import OPEN, Vocabulary
from tasks.language.words import MAX_LENGTH
from tasks.questions.rollouts import LOGPROB_UNIT, Block, blocks, logprob_units
from tasks.questions.votes import Merged, Votes
from tasks.tables import shards

_UNPARSED, _OUTSIDE = -1, -2  # targets of an answer that is no candidate
BLOCK_ROLLOUTS = 40_000  # about as many rollouts are merged at a time
MERGED_AT_ONCE = 1000  # images a block in `merge_all`, which keeps all results anyway


def merge(completions: Iterable[tuple[str, float]], names: ClassNames, allowed: set[int]) -> Votes:
    """Merge one image's rollouts, pairs of (completion, mean log-probability), by class.

    Only classes in `allowed` become candidates.
    """
    pairs = list(completions)
    parsed = [answers.parse(text) for text, _ in pairs]
    distinct = dict.fromkeys((p.answer, p.problem) for p in parsed)
    known = {key: code for code, key in enumerate(distinct)}
    block = Block(
        0,
        1,
        np.zeros(len(pairs), np.int64),
        np.array([known[p.answer, p.problem] for p in parsed], np.int64),
        logprob_units(np.array([value for _, value in pairs], np.float64)),
        [text for text, _ in known],
        [problem for _, problem in known],
    )
    return next(merge_block(block, Vocabulary(names, frozenset(allowed))).images())


def merge_all(
    propose: Path,
    names: ClassNames,
    allowed: set[int],
    first: int | None = None,
    table: str = "rollouts",
) -> dict[str, Votes]:
    """Image id -> votes, over all shards of a table, or over the `first` rollouts of each image.

    For sets that fit into memory; `merge_images` takes sets of any size.
    """
    ids = {i for p in shards.paths(propose, table) for i in _image_ids(p)}
    image_ids = sorted(ids)
    vocabulary = Vocabulary(names, frozenset(allowed))
    merges = (
        merge_block(block, vocabulary)
        for block in blocks(propose, image_ids, MERGED_AT_ONCE, first, table)
    )
    return {
        image_id: votes
        for merged in merges
        for image_id, votes in zip(
            image_ids[merged.start : merged.stop], merged.images(), strict=True
        )
    }


def merge_images(
    propose: Path, image_ids: Sequence[str], vocabulary: Vocabulary, size: int
) -> Iterator[Merged]:
    """The merged votes of `image_ids`, in order, in blocks of `size` images."""
    for block in blocks(propose, image_ids, size):
        yield merge_block(block, vocabulary)


def merge_block(block: Block, vocabulary: Vocabulary) -> Merged:
    """Merge the votes of a block's images. Sorting makes the result independent of row order."""
    meaning = _meanings(block, vocabulary)
    images = block.stop - block.start
    # One row for each distinct answer of an image, with its votes and summed log-probability.
    image, code, votes, logprob = _grouped(
        block.image, meaning.order[block.answer], np.ones(len(block.image), np.int64), block.logprob
    )
    target = meaning.targets[code]
    counts = np.zeros((images, 3), np.int64)
    counts[:, 0] = np.bincount(block.image, minlength=images)
    for column, kind in ((1, _UNPARSED), (2, _OUTSIDE)):
        counts[:, column] = np.bincount(image, votes * (target == kind), images)
    kept = target >= 0
    c_image, c_target, c_votes, c_logprob = _grouped(
        image[kept], target[kept], votes[kept], logprob[kept]
    )
    ranked = np.lexsort((c_target, -c_logprob, -c_votes, c_image))
    c_target, c_votes = c_target[ranked], c_votes[ranked]
    listed = np.lexsort((code, -votes, image))
    starts = _starts(c_image, images)
    class_ids = np.where(c_target < meaning.classes, c_target, OPEN)
    return Merged(
        block.start,
        block.stop,
        counts,
        starts,
        class_ids.astype(np.int32),
        c_votes.astype(np.int32),
        c_logprob[ranked] / (c_votes * LOGPROB_UNIT),
        _open_names(meaning, image, code, votes, c_image[ranked], c_target),
        _starts(image, images),
        code[listed].astype(np.int32),
        votes[listed].astype(np.int32),
        meaning.texts,
        meaning.steps,
        meaning.class_ids,
    )


@dataclass(frozen=True)
class _Meanings:
    """What a block's distinct answers mean, in the sorted order of their texts.

    `order` maps a block's answer code to its rank in that order, so that no rank depends on the
    order of rows. A target is a class id, or at least `classes` for an open name.
    """

    order: NDArray[np.int64]
    texts: list[str]
    steps: list[str]
    class_ids: NDArray[np.int32]
    targets: NDArray[np.int64]
    classes: int


def _meanings(block: Block, vocabulary: Vocabulary) -> _Meanings:
    """Match each distinct answer of a block once."""
    texts = [text or "" for text in block.texts]
    ranks = sorted(range(len(texts)), key=lambda code: (texts[code], block.problems[code]))
    order = np.empty(len(ranks), np.int64)
    order[ranks] = np.arange(len(ranks))
    read = [
        (OPEN, block.problems[code], "")
        if block.texts[code] is None
        else vocabulary.read(texts[code])
        for code in ranks
    ]
    classes = len(vocabulary.names.names)
    keys = sorted({key for *_, key in read if key})
    numbers = {key: classes + number for number, key in enumerate(keys)}
    targets = [
        _UNPARSED
        if block.texts[code] is None
        else class_id
        if class_id in vocabulary.allowed
        else numbers.get(key, _OUTSIDE)
        for code, (class_id, _, key) in zip(ranks, read, strict=True)
    ]
    return _Meanings(
        order,
        [texts[code][:MAX_LENGTH] for code in ranks],
        [step for _, step, _ in read],
        np.array([class_id for class_id, *_ in read], np.int32),
        np.array(targets, np.int64),
        classes,
    )


def _grouped(
    image: NDArray[np.int64], key: NDArray[np.int64], *values: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    """(images, keys, sums of each of `values`), one row for each distinct (image, key), sorted."""
    if not len(image):
        return (image, key, *values)
    width = int(key.max()) + 1 - min(int(key.min()), 0)
    joint = image * width + key
    order = np.argsort(joint)
    first = np.flatnonzero(np.diff(joint[order], prepend=joint[order[0]] - 1))
    sums = [np.add.reduceat(value[order], first) for value in values]
    return (image[order][first], key[order][first], *sums)


def _starts(image: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(image, minlength=images))])


def _open_names(
    meaning: _Meanings,
    image: NDArray[np.int64],
    code: NDArray[np.int64],
    votes: NDArray[np.int64],
    c_image: NDArray[np.int64],
    c_target: NDArray[np.int64],
) -> dict[int, str]:
    """Index of an open candidate -> its most frequent spelling in its image, white space as one blank."""
    spelled: dict[tuple[int, int], Counter[str]] = {}
    for at in np.flatnonzero(meaning.targets[code] >= meaning.classes):
        name = " ".join(meaning.texts[code[at]].split())
        counts = spelled.setdefault((image[at], meaning.targets[code[at]]), Counter())
        counts[name] += int(votes[at])
    return {
        int(index): min(
            spelled[c_image[index], c_target[index]].items(), key=lambda item: (-item[1], item[0])
        )[0]
        for index in np.flatnonzero(c_target >= meaning.classes)
    }


def _image_ids(path: Path) -> set[str]:
    return set(shards.read_file(path, ["image_id"])["image_id"].unique().to_pylist())
