"""The settings of Evaluate, of predictions, and of Judge."""

from dataclasses import dataclass
from typing import ClassVar

from tasks.language.prompts import LETTERS, PROMPTS
from tasks.runtime.errors import StageError
from tasks.runtime.settings import Settings, instalments, setting

MODES = ("one_step", "majority", "two_step", "mcq", "constrained", "adaptive")
PARTS = ("test", "val", "base_val_novel_test")
JUDGED = ("unmatched", "all", "samples")
PREDICT_MODES = ("two_step", "one_step", "adaptive")


def parts_of(part: str) -> dict[str, str]:
    """Group -> test or val, for one of PARTS."""
    if part == "base_val_novel_test":
        return {"base": "val", "novel": "test"}
    return {"base": part, "novel": part}


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """[Evaluate]: which images a policy is asked about, and in which modes."""

    section: ClassVar[str] = "Evaluate"

    part: str = setting("which images; val is for tuning", choices=PARTS)
    modes: str = setting("of inference", choices=MODES, several=True)
    num_rollouts: int = setting(at_least=1)
    num_options: int = setting(at_least=2, at_most=len(LETTERS))
    prompt: str = setting("whether the question shows the names", choices=PROMPTS)
    instalments: str = setting(
        "with adaptive: samples after which the votes are looked at", default=""
    )
    shard_size: int = setting("images a shard; the unit of resuming", at_least=1)
    limit: int = setting(
        "the first n images of each group only, for a trial; 0: all", at_least=0, unset=0
    )

    @property
    def parts(self) -> dict[str, str]:
        """Group -> the part of the split whose images are evaluated."""
        return parts_of(self.part)

    @property
    def mode_names(self) -> list[str]:
        """The modes that are set, in the order of MODES."""
        named = self.modes.replace(",", " ").split()
        return [mode for mode in MODES if mode in named]

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples after which the votes are looked at, `num_rollouts` last."""
        return (*instalments("Evaluate", self.instalments, self.num_rollouts), self.num_rollouts)

    def check(self) -> None:
        if not self.mode_names:
            raise StageError(f"[Evaluate] modes must name some of {', '.join(MODES)}; got none")
        instalments("Evaluate", self.instalments, self.num_rollouts)


@dataclass(frozen=True, kw_only=True)
class PredictSettings(Settings):
    """How predict asks a policy about images: as Evaluate does, in the modes that need no labels."""

    mode: str = setting("of inference", choices=PREDICT_MODES, default="two_step")
    num_rollouts: int = setting("samples an image", at_least=1, default=20)
    num_options: int = setting(
        "of the second step's question", at_least=2, at_most=len(LETTERS), default=5
    )
    prompt: str = setting("whether the question shows the names", choices=PROMPTS, default="open")
    thresholds: str = setting(
        "with mode adaptive: an Evaluate artifact in that mode, or its thresholds.json", default=""
    )
    seed: int = setting("of the samples", at_least=0, default=0)

    def check(self) -> None:
        if (self.mode == "adaptive") != bool(self.thresholds):
            raise StageError(
                "mode adaptive needs thresholds: an Evaluate artifact whose [Evaluate] modes have adaptive"
                if self.mode == "adaptive"
                else "thresholds are for mode adaptive"
            )


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Settings):
    """[Judge]: the endpoint that judges answers, and how it is asked."""

    section: ClassVar[str] = "Judge"

    url: str = setting("OpenAI-compatible; empty: no judge", significant=False)
    model: str = setting("the endpoint's name of the model that judges")
    answers: str = setting(
        "which free-text answers it is asked about",
        choices=JUDGED,
        unset="unmatched",
        default="unmatched",
    )
    api_key_env: str = setting("the variable that holds the key", significant=False)
    max_tokens: int = setting("of a verdict", at_least=1)
    concurrency: int = setting("requests in flight", at_least=1, significant=False)
    timeout: float = setting("seconds for a request", above=0, significant=False)
    attempts: int = setting("of a request, with backoff", at_least=1, significant=False)
    shard_size: int = setting("verdicts a shard", at_least=1, significant=False)
    max_failed_share: float = setting(
        "more pairs without a verdict: an error", at_least=0, at_most=1
    )
