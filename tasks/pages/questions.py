"""Builds the page of a BuildMCQ artifact's questions, which opens offline, and lists its counts.

The page shows questions with image, options, votes and raw answers. A reader filters them by class,
by whether the truth was injected, and by difficulty; a link can hold the filters:
`page.html#class=crow&injected=yes&level=hard`. The template escapes what a model wrote. The content
security policy allows the page's one script by its digest, and no other.
"""

import base64
import hashlib
import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from tasks.language.prompts import LETTERS
from tasks.pages import render, source
from tasks.pages.gallery import data_uri
from tasks.tables import shards

# The difficulty is the truth's margin over the strongest other candidate, as a share of the rollouts.
LEVELS = {"easy": "truth ahead by a quarter or more", "close": "between", "hard": "behind by more"}
_EDGE = 0.25
_ANSWERS = 12  # answers of an image that the page shows at most
_CUT = 120  # characters of an answer that the page shows at most


def facts(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The counts in `stats.json` as (label, text), for the terminal and the page."""
    outcomes = dict(stats["outcomes"])
    kept = outcomes.pop("kept", 0)
    skipped = ", ".join(f"{count:,} {name}" for name, count in sorted(outcomes.items()))
    sizes = _listed(dict(sorted(stats["option_counts"].items(), key=lambda item: int(item[0]))))
    counts = [
        ("questions", f"{kept:,} of {stats['images']:,} images"),
        ("skipped", skipped or "none"),
        ("truth injected", _share(stats["injected"], kept)),
        ("options", f"{stats['mean_options']:.2f} on average ({sizes})"),
        ("options by source", _listed(stats["option_sources"])),
        ("right letters", _listed(dict(sorted(stats["letters"].items())))),
        ("unparsed rollouts", _share(stats["unparsed"], stats["rollouts"])),
        ("rollouts that name no candidate", _share(stats["outside_vocabulary"], stats["rollouts"])),
        ("rollouts by how they were read", _listed(_falling(stats["match_steps"]))),
    ]
    if stats["answer_differs_from_label"]:
        wrong = _share(stats["answer_differs_from_label"], kept)
        counts.append(("answers that differ from the label", wrong))
    for truth, other, votes in stats["most_confused"][:10]:
        counts.append(("most confused", f"{truth} taken for {other}: {votes:,} votes"))
    return counts


def questions_page(folder: Path, stats: Mapping[str, Any], title: str, size: int) -> str:
    """The page as HTML, with at most `size` questions of the artifact in `folder`, drawn at random."""
    rows, total = _drawn(folder, size)
    candidates = _candidates(folder, {row["image_id"] for row in rows})
    script = hashlib.sha256(source("questions.js").encode()).digest()
    return render(
        "questions.html.jinja",
        title=title,
        digest=base64.b64encode(script).decode(),
        facts=facts(stats),
        total=total,
        levels="; ".join(f"{name}: {meaning}" for name, meaning in LEVELS.items()),
        choices=(
            ("class", "right answer", sorted({_truth(row) for row in rows})),
            ("injected", "truth injected", ("yes", "no")),
            ("level", "difficulty", tuple(LEVELS)),
        ),
        cards=[_card(row, candidates[row["image_id"]]) for row in rows],
    )


def level(margin: float) -> str:
    """The level of difficulty of a question with this margin."""
    return "easy" if margin >= _EDGE else "hard" if margin < -_EDGE else "close"


def _drawn(folder: Path, size: int) -> tuple[list[dict[str, Any]], int]:
    """The `size` questions with the lowest ids, which are hashes, and the count of all questions."""
    paths = shards.paths(folder, "mcq")
    ids = [
        mcq_id
        for path in paths
        for mcq_id in shards.read_file(path, ["mcq_id"])["mcq_id"].to_pylist()
    ]
    lowest = heapq.nsmallest(size, ids)
    rows = [
        row
        for path in paths
        for row in shards.read_file(path, None, pc.field("mcq_id").isin(lowest)).to_pylist()
    ]
    return sorted(rows, key=lambda row: row["mcq_id"]), len(ids)


def _candidates(folder: Path, image_ids: set[str]) -> dict[str, dict[str, Any]]:
    wanted = pc.field("image_id").isin(sorted(image_ids))
    return {
        row["image_id"]: row
        for path in shards.paths(folder, "candidates")
        for row in shards.read_file(path, None, wanted).to_pylist()
    }


def _card(row: Mapping[str, Any], candidates: Mapping[str, Any]) -> dict[str, Any]:
    columns = (row["options"], row["option_votes"], row["option_sources"])
    options = zip(LETTERS, *columns, strict=False)
    answers = list(
        zip(
            candidates["answers"],
            candidates["answer_votes"],
            candidates["answer_steps"],
            strict=True,
        )
    )
    return {
        "truth": _truth(row),
        "picture": data_uri(row["image"]["bytes"]),
        "image_id": row["image_id"],
        "injected": row["truth_injected"],
        "level": level(row["margin"]),
        "label_differs": row["label_differs"],
        "figures": (
            f"truth share {row['truth_share']:.2f}, margin {row['margin']:+.2f}, "
            f"entropy {row['entropy']:.2f}"
        ),
        "options": [(*option, option[0] == row["answer_letter"]) for option in options],
        "num_rollouts": candidates["num_rollouts"],
        "answers": [(_short(text), votes, step) for text, votes, step in answers[:_ANSWERS]],
        "more_answers": len(answers) - _ANSWERS,
    }


def _short(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]} …"


def _truth(row: Mapping[str, Any]) -> str:
    return row["options"][LETTERS.index(row["answer_letter"])]


def _falling(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({100 * part / max(1, whole):.1f} %)"
