"""Builds the shards of BuildMCQ: merges votes, chooses options, balances letters, counts outcomes."""

import hashlib
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from data_cards import Card
from tasks.language import class_names, prompts
from tasks.language.prompts import LETTERS
from tasks.language.vocabulary import Vocabulary
from tasks.questions.candidates import BLOCK_ROLLOUTS, merge_images
from tasks.questions.options import (
    Neighbours,
    Option,
    balanced_letters,
    choose_options,
    count_confusions,
    mcq_id,
    shuffle_options,
)
from tasks.questions.settings import BuildMCQSettings
from tasks.questions.stats import count, empty_stats, most_confused
from tasks.questions.tables import candidate_table, difficulties
from tasks.questions.votes import Candidate, Merged
from tasks.runtime.errors import StageError
from tasks.tables import schemas, shards
from tasks.tables.seeding import row_generator, row_generators
from tasks.tables.split_table import Row, Rows

Asked = tuple[Row, list[Option], int, int]  # split row, options, truth, image number in the block


@dataclass
class Builder:
    """Builds the shards of one card under some settings, and counts the outcomes in `stats`."""

    card: Card
    settings: BuildMCQSettings
    prompt_style: str
    seed: int
    stats: dict[str, Any] = field(default_factory=dict)
    schema: pa.Schema = field(default_factory=schemas.mcq)

    def shards(
        self,
        rows: Rows,
        propose: Path,
        images_of: Callable[[list[str]], dict[str, bytes]],
        finished: Callable[[int], tuple[pa.Table, pa.Table] | None] = lambda _: None,
        repeated: Callable[[str], bool] = lambda _: True,
    ) -> Iterator[tuple[pa.Table, pa.Table]]:
        """(candidates, questions) of each shard of `rows`, which stand in the order of the split.

        `images_of` returns the encoded bytes by image id. `finished` returns a shard that an earlier
        run has written; it is counted and passed on. `repeated` tells of a SHA-256 whether several
        pictures may have it: the others are not remembered. `stats` is complete after the last shard.
        """
        self.stats = empty_stats(len(rows))
        outcomes: Counter[str] = Counter()
        seen: set[str] = set()
        with tempfile.TemporaryFile() as merged:
            truths, near = self._merge(rows, propose, merged)
            merged.seek(0)
            block = pickle.load(merged)
            listed = block.candidates()
            for index, part in enumerate(shards.chunks(rows, self.settings.shard_size)):
                start = index * self.settings.shard_size
                if start >= block.stop:
                    block = pickle.load(merged)
                    listed = block.candidates()
                if done := finished(index):
                    table, written = done
                    row_outcomes = table["outcome"].to_pylist()
                    pictures = written["image"].to_pylist()
                    digests = (hashlib.sha256(image["bytes"]).hexdigest() for image in pictures)
                    seen.update(filter(repeated, digests))
                    outcomes.update(row_outcomes)
                    count(self.stats, written, table, self.settings.num_options)
                    yield done
                    continue
                images = images_of([row["image_id"] for row in part])
                row_outcomes, asked = [], []
                for number, row in enumerate(part, start):
                    image, truth = number - block.start, truths[number]
                    candidates = listed[block.starts[image] : block.starts[image + 1]]
                    counts = block.counts[image]
                    options, outcome = self._options(row, candidates, counts, truth, near)
                    if outcome == "kept":
                        digest = hashlib.sha256(images[row["image_id"]]).hexdigest()
                        outcome = "duplicate_image" if digest in seen else outcome
                        if repeated(digest):
                            seen.add(digest)
                    if outcome == "kept":
                        asked.append((row, options, truth, image))
                    row_outcomes.append(outcome)
                outcomes.update(row_outcomes)
                table = candidate_table(part, block, start - block.start, row_outcomes, self.card)
                written = self._questions(asked, block, images, index)
                count(self.stats, written, table, self.settings.num_options)
                yield table, written
        self.stats["outcomes"] = dict(outcomes)
        self.stats["most_confused"] = most_confused(near.confused, self.card)

    def _merge(self, rows: Rows, propose: Path, file: IO[bytes]) -> tuple[list[int], Neighbours]:
        """Merge all votes, and write the merged blocks to `file`.

        The first question already needs the confusions of the whole set. Returns each image's
        truth, and the neighbours of each class.
        """
        rules, card = self.settings, self.card
        names = class_names.ClassNames.of(
            card, fuzzy_threshold=rules.fuzzy_threshold, fuzzy_margin=rules.fuzzy_margin
        )
        base = rows.classes or list(range(len(card.classes)))
        vocabulary = Vocabulary(names, frozenset(base), rules.vocabulary == "open")
        ids = rows.ids
        # A block consists of whole shards.
        per_shard = max(
            1, shards.count_rows(propose, "rollouts") * self.settings.shard_size // len(ids)
        )
        size = self.settings.shard_size * max(1, BLOCK_ROLLOUTS // per_shard)
        truths: list[int] = []
        without: list[int] = []
        confused: dict[int, Counter[int]] = {}
        for block in merge_images(propose, ids, vocabulary, size):
            own = [self._truth(row, block, image) for row, image in _within(rows, block)]
            count_confusions(confused, block, own)
            truths += own
            without += (block.start + np.flatnonzero(block.counts[:, 0] == 0)).tolist()
            pickle.dump(block, file)
        if without and (gone := propose / "rollouts_refused.parquet").exists():
            refused = set(shards.read_file(gone, ["image_id"])["image_id"].to_pylist())
            without = [position for position in without if ids[position] not in refused]
        if without:
            raise StageError(
                f"{propose} has no rollouts of {len(without)} images, {ids[without[0]]} first; a trial "
                "with [Propose] limit ends there: set it to 0 and run again"
            )
        return truths, Neighbours(card.classes, base, confused)

    def _truth(self, row: Row, block: Merged, image: int) -> int:
        """The class id that counts as the truth, or -1 where there is none."""
        if self.settings.answer_from == "label":
            return row["label"] if _labelled(row) else -1
        low, high = block.starts[image], block.starts[image + 1]
        classes = block.class_ids[low:high]
        known = classes[classes >= 0]
        return int(known[0]) if len(known) else -1

    def _options(
        self,
        row: Row,
        candidates: list[Candidate],
        counts: np.ndarray,
        truth: int,
        near: Neighbours,
    ) -> tuple[list[Option], str]:
        """The options of an image's question, and the outcome: kept, or why the image is skipped."""
        rules = self.settings
        rollouts, unparsed = counts[0], counts[1]
        if candidates and unparsed > rules.max_unparsed_per_image * rollouts:
            return [], "too_many_unparsed"
        if candidates and truth < 0:
            return [], "no_label" if rules.answer_from == "label" else "no_candidates"
        by_text = "text" in (rules.top_up, rules.options_from) and bool(candidates)
        return choose_options(
            candidates,
            truth,
            num_options=rules.num_options,
            min_options=rules.fewest_options(len(candidates)),
            top_up=rules.top_up,
            confusion=near.of("confusion", truth) if candidates else (),
            generator=row_generator(self.seed, row["image_id"]) if rules.draws else None,
            text=near.of("text", truth) if by_text else (),
            options_from=rules.options_from,
            min_truth_votes=rules.min_truth_votes,
        )

    def _questions(
        self, asked: list[Asked], block: Merged, images: dict[str, bytes], index: int
    ) -> pa.Table:
        """Shard number `index` of the table mcq; `images` are encoded bytes by image id."""
        card, ids = self.card, [row["image_id"] for row, *_ in asked]
        counts = [len(options) for _, options, *_ in asked]
        positions = balanced_letters(counts, np.random.default_rng([self.seed, index]))
        generators = row_generators(self.seed + 1, ids)
        orders = [
            shuffle_options(options, generator, position, truth)
            for (_, options, truth, _), position, generator in zip(
                asked, positions, generators, strict=True
            )
        ]
        names = [[option.name or card.classes[option.class_id] for option in o] for o in orders]
        sources = [[option.source for option in order] for order in orders]
        class_ids = [[option.class_id for option in order] for order in orders]
        open_names = [[option.name for option in order if option.name] for order in orders]
        style = self.prompt_style
        columns = {
            "mcq_id": [mcq_id(*of) for of in zip(ids, class_ids, open_names, strict=True)],
            "image_id": ids,
            "image": pictures(ids, images, self.schema.field("image").type),
            "question": [
                prompts.mcq_question(card.noun, card.kind, listed, style=style) for listed in names
            ],
            "options": names,
            "option_class_ids": class_ids,
            "option_votes": [[option.votes for option in order] for order in orders],
            "option_sources": sources,
            "answer_letter": [LETTERS[position] for position in positions],
            "truth_injected": ["truth" in listed for listed in sources],
            "label_differs": [_labelled(row) and row["label"] != t for row, _, t, _ in asked],
            **difficulties(block, [a[3] for a in asked], [a[2] for a in asked]),
        }
        return pa.table(
            [
                column if isinstance(column, pa.ChunkedArray) else pa.array(column, field.type)
                for field, column in ((field, columns[field.name]) for field in self.schema)
            ],
            schema=self.schema,
        )


def pictures(ids: list[str], images: dict[str, bytes], kind: pa.DataType) -> pa.ChunkedArray:
    """The column of encoded images. One chunk of an Arrow column holds less than 2 GB."""
    chunks = [pa.array([{"bytes": images[i], "path": i}], kind) for i in ids]
    return pa.chunked_array(chunks, kind)


def _within(rows: Rows, block: Merged) -> Iterator[tuple[Row, int]]:
    return zip(rows[block.start : block.stop], range(block.stop - block.start), strict=True)


def _labelled(row: Row) -> bool:
    return row["label"] is not None and row["label"] >= 0
