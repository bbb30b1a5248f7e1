"""The settings of Propose and BuildMCQ."""

from dataclasses import dataclass
from typing import ClassVar

from tasks.language.prompts import LETTERS, PROMPTS
from tasks.runtime.errors import StageError
from tasks.runtime.settings import Settings, instalments, setting

TOP_UPS = ("confusion", "text", "random", "none")
VOCABULARIES = ("closed", "open")
OPTIONS_FROM = ("policy", "random", "text", "hard_negative")
ANSWERS_FROM = ("label", "majority")
UNLABELLED_GROUPS = ("base", "novel")
UNLABELLED_PARTS = ("train", "test")
REFRESHES = ("all", "unsolved", "sample")
SOLVED = ("keep", "retire")
# The rewards that go by labels. The first of them that was logged shows whether a question was solved.
ANSWERED = ("letter", "contrast", "difficulty_weighted", "exact", "virft_compat", "graded")


@dataclass(frozen=True, kw_only=True)
class ProposeSettings(Settings):
    """[Propose]: what the policy is asked and how often, and which images a refresh asks about."""

    section: ClassVar[str] = "Propose"

    num_rollouts: int = setting(at_least=1)
    prompt: str = setting("whether the question shows the names", choices=PROMPTS)
    instalments: str = setting(
        "samples after which an image whose every answer names the truth is done; empty: never",
        default="",
    )
    shard_size: int = setting("images a shard; the unit of resuming", at_least=1)
    max_unparsed_share: float = setting("more unreadable answers: an error", at_least=0, at_most=1)
    fail_fast_unparsed_share: float = setting("the same after two shards", at_least=0, at_most=1)
    max_lost_share: float = setting(
        "more images the engine refuses: an error", at_least=0, at_most=1
    )
    limit: int = setting("the first n images only, for a trial; 0: all", at_least=0)
    refresh: str = setting("which images later rounds ask again about", choices=REFRESHES)
    refresh_share: float = setting("of the images, with refresh = sample", above=0, at_most=1)
    solved_at: float = setting("mean reward of its latest use: solved")
    solved: str = setting("with refresh = unsolved: what becomes of those solved", choices=SOLVED)

    @property
    def counts(self) -> tuple[int, ...]:
        """The samples after which an image may be done; () where every image gets all of them."""
        return instalments("Propose", self.instalments, self.num_rollouts)

    def check(self) -> None:
        instalments("Propose", self.instalments, self.num_rollouts)


@dataclass(frozen=True, kw_only=True)
class BuildMCQSettings(Settings):
    """[BuildMCQ]: how votes are merged into candidates, and how options are chosen among them."""

    section: ClassVar[str] = "BuildMCQ"

    num_options: int = setting(at_least=2, at_most=len(LETTERS))
    min_options: int = setting("fewer are topped up", at_least=2)
    top_up: str = setting("which wrong classes are added", choices=TOP_UPS)
    lone_wrong_options: int = setting(
        "options where the only candidate is wrong; 0: as min_options",
        at_least=0,
        unset=0,
        default=0,
    )
    vocabulary: str = setting("which names are offered", choices=VOCABULARIES)
    fuzzy_threshold: float = setting("similarity up to 100; 0: off", at_least=0, at_most=100)
    fuzzy_margin: float = setting("above the similarity to any other class", at_least=0)
    options_from: str = setting("where wrong options come from", choices=OPTIONS_FROM)
    answer_from: str = setting("what counts as the truth", choices=ANSWERS_FROM)
    min_truth_votes: int = setting("fewer rollouts that name the truth: skipped", at_least=0)
    max_unparsed_per_image: float = setting(
        "a larger share that cannot be read: skipped", at_least=0, at_most=1
    )
    max_lost_share: float = setting("more images without a candidate: an error", at_least=0)
    unlabelled_groups: str = setting(
        "classes whose images training without labels sees",
        choices=UNLABELLED_GROUPS,
        several=True,
        unset="base",
    )
    unlabelled_part: str = setting(
        "their part of the split; test: the images that are then scored",
        choices=UNLABELLED_PARTS,
        unset="train",
    )
    shard_size: int = setting("images a shard; letters are balanced in each", at_least=1)

    @property
    def draws(self) -> bool:
        """Whether some options are drawn at random."""
        return self.top_up == "random" or self.options_from == "random"

    def fewest_options(self, num_candidates: int) -> int:
        """The number of options up to which the question of an image is topped up.

        The published code leaves two options as they are, and makes four of a lone wrong candidate.
        """
        lone = num_candidates == 1 and self.lone_wrong_options
        return self.lone_wrong_options if lone else self.min_options

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The groups of classes that training without labels sees."""
        words = self.unlabelled_groups.replace(",", " ").split()
        return tuple(group for group in UNLABELLED_GROUPS if group in words)

    def check(self) -> None:
        if not self.unlabelled:
            raise StageError(
                "[BuildMCQ] unlabelled_groups names no group; choose of "
                f"{', '.join(UNLABELLED_GROUPS)}"
            )
        for name in ("min_options", "lone_wrong_options"):
            if (least := getattr(self, name)) > self.num_options:
                raise StageError(
                    f"[BuildMCQ] {name} must be at most num_options; got {least} and "
                    f"{self.num_options}"
                )
        if self.lone_wrong_options and self.top_up == "none":
            raise StageError(
                "[BuildMCQ] lone_wrong_options needs wrong classes to add; set top_up to one of "
                f"{', '.join(TOP_UPS[:-1])}"
            )
