"""Adaptive two-step inference: as many samples, and options, as an image needs.

    sampling   comes in instalments. It stops when the samples that are left cannot change the leader,
               or when the leader is ahead by the share `stop` of the samples so far.
    question   none when the leader is ahead by `agree`; two options when the first two candidates hold
               the share `pair` of the samples together; else up to `num_options`.

`tasks/evaluation/tuning.py` sets the three thresholds, on validation images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tasks.engines.base import Completion
from tasks.evaluation.settings import PredictSettings
from tasks.language.class_names import ClassNames
from tasks.questions.candidates import merge
from tasks.questions.options import Option
from tasks.questions.votes import Votes
from tasks.runtime.errors import StageError
from tasks.runtime.settings import instalments
from tasks.tables import schemas, shards

NEVER = 2.0  # a share that is never reached
FILE = "thresholds.json"


@dataclass(frozen=True)
class Thresholds:
    """Shares of the samples so far; the module's docstring says what each decides."""

    stop: float = 1.0
    agree: float = 1.0
    pair: float = NEVER


class Decision(NamedTuple):
    """How an image is answered: after so many samples, by a question with so many options.

    With one option the votes decide, and nothing is asked.
    """

    num_rollouts: int
    num_options: int


def lead(votes: Votes) -> int:
    """By how many votes the first candidate leads the second one."""
    counts = [candidate.votes for candidate in votes.candidates[:2]]
    return counts[0] - sum(counts[1:]) if counts else 0


def is_settled(votes: Votes, left: int, thresholds: Thresholds) -> bool:
    """Whether sampling stops, with `left` samples to come."""
    ahead = lead(votes)
    return ahead > left or ahead >= max(1, thresholds.stop * votes.num_rollouts)


def num_options(votes: Votes, most: int, thresholds: Thresholds) -> int:
    """The options of the question about these votes, at most `most`; 1 for none."""
    if lead(votes) >= max(1, thresholds.agree * votes.num_rollouts):
        return 1
    top_two = sum(candidate.votes for candidate in votes.candidates[:2])
    return 2 if top_two >= thresholds.pair * votes.num_rollouts else most


def decide(by_count: Mapping[int, Votes], most: int, thresholds: Thresholds) -> Decision:
    """The decision about an image; `by_count` holds its votes after each instalment, ascending."""
    total = max(by_count)
    for count, votes in by_count.items():
        if count == total or is_settled(votes, total - count, thresholds):
            return Decision(count, num_options(votes, most, thresholds))
    raise ValueError("an image without an instalment")


@dataclass(frozen=True)
class Settled:
    """`tasks.engines.refusals.Enough` for adaptive inference."""

    counts: tuple[int, ...]
    num_rollouts: int
    thresholds: Thresholds
    names: ClassNames
    allowed: Mapping[str, frozenset[int]]  # by image; the classes that count as candidates

    def only(self, keys: Sequence[str]) -> "Settled":
        """The same rule for these images alone."""
        return replace(self, allowed={key: self.allowed[key] for key in keys})

    def __call__(self, key: str, completions: Sequence[Completion]) -> bool:
        pairs = [(each.text, each.mean_logprob) for each in completions]
        votes = merge(pairs, self.names, set(self.allowed[key]))
        return is_settled(votes, self.num_rollouts - len(pairs), self.thresholds)


@dataclass(frozen=True)
class Adaptation:
    """What a prediction in the mode adaptive needs: the thresholds, and how the samples come."""

    thresholds: Thresholds
    counts: tuple[int, ...]
    num_rollouts: int

    def enough(self, names: ClassNames, allowed: Mapping[str, frozenset[int]]) -> Settled:
        """The rule for images whose candidates are `allowed`, by image."""
        return Settled(self.counts, self.num_rollouts, self.thresholds, names, allowed)


def of_prediction(settings: PredictSettings) -> Adaptation:
    """The adaptation that `settings.thresholds` names.

    Raises StageError where the thresholds were set for other numbers of samples or options, or for
    another prompt, because then they say nothing about these.
    """
    contents = load(Path(settings.thresholds))
    asked = contents["asked"]
    for name in ("num_rollouts", "num_options", "prompt"):
        if (wanted := asked.get(name)) != (own := getattr(settings, name)):
            raise StageError(
                f"the thresholds of {settings.thresholds} were set with {name} = {wanted}; this "
                f"prediction has {own}"
            )
    counts = instalments("Evaluate", asked.get("instalments", ""), settings.num_rollouts)
    return Adaptation(Thresholds(**contents["thresholds"]), counts, settings.num_rollouts)


def write(
    folder: Path, decisions: Mapping[str, Decision], options: Mapping[str, Sequence[Option]]
) -> None:
    """Write `adaptive_counts.parquet`: one row is an image, with its samples and its question's options."""
    rows = [
        {"image_id": key, "num_rollouts": decision.num_rollouts, "num_options": len(options[key])}
        for key, decision in decisions.items()
    ]
    shards.write(folder / "adaptive_counts.parquet", rows, schemas.adaptive())


def save(
    folder: Path, thresholds: Thresholds, figures: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Write the thresholds with the figures behind them, and how the images were `asked`."""
    contents = {"thresholds": asdict(thresholds), "asked": asked, "val": figures}
    (folder / FILE).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def load(place: Path) -> dict[str, Any]:
    """The contents of a file that `save` wrote; `place` may be the folder that holds it.

    Raises StageError where it cannot be read.
    """
    path = place / FILE if place.is_dir() else place
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Thresholds(**contents["thresholds"])
        return {"asked": {}, **contents}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path} holds no thresholds of adaptive inference ({error}); evaluate the policy with "
            "adaptive among [Evaluate] modes, which writes them"
        ) from error
