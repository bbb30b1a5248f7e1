"""The settings of Download and Split."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tasks.runtime.errors import StageError
from tasks.runtime.settings import Settings, setting

PROTOCOLS = ("base_to_novel", "all")
MAX_NEAR = 16  # bits of 64; with more, pictures of similar composition count as near


@dataclass(frozen=True, kw_only=True)
class DownloadSettings(Settings):
    """[Download]: where images come from, and how many may be unusable."""

    section: ClassVar[str] = "Download"

    max_reject_share: float = setting(
        "more unusable files than this is an error", at_least=0, at_most=1
    )
    archives: Path = setting("where official archives lie, or are downloaded to", significant=False)
    mirror: bool = setting("read the card's copy on the hub, not the archives")
    decode_threads: int = setting("threads; 0: one a core", at_least=0, significant=False)


@dataclass(frozen=True, kw_only=True)
class SplitSettings(Settings):
    """[Split]: which images are test, val and train, and how many a class keeps.

    Each share is one of a class's train images. It is used only where the source does not already
    say which images are test, val or pretrain.
    """

    section: ClassVar[str] = "Split"

    protocol: str = setting("which classes are base", choices=PROTOCOLS)
    test_share: float = setting(at_least=0, at_most=1)
    val_share: float = setting(at_least=0, at_most=1)
    pretrain_share: float = setting(at_least=0, at_most=1)
    val_per_class: int = setting("a count in place of val_share; 0: the share", at_least=0)
    split_file: str = setting("a split of CoOp's or DiVE-k's to follow; empty: none")
    shots: int = setting(
        "train images a class keeps; CoOp's draw with a split file of theirs; 0: all", at_least=0
    )
    train_caps: dict[str, int] = setting(
        "card, or * for all -> train images of base classes kept at most, spread over the classes"
    )
    near_duplicates: int = setting(
        "bits of 64 in which near pictures differ", at_least=0, at_most=MAX_NEAR
    )

    def check(self) -> None:
        if self.test_share + self.val_share + self.pretrain_share >= 1:
            raise StageError("[Split] test_share + val_share + pretrain_share must stay below 1")
        if any(not isinstance(cap, int) or cap < 0 for cap in self.train_caps.values()):
            raise StageError("[Split] train_caps must be whole numbers, 0 (all) or more")

    def cap(self, card: str) -> int:
        """How many train images of a card are kept; 0: all."""
        return self.train_caps.get(card, self.train_caps.get("*", 0))
