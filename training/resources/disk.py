"""Estimates the disk space of a training before its first step, without loading anything.

A checkpoint holds the trained weights and the optimizer's states; with full fine-tuning in bfloat16
both in float32. `keep_checkpoints` of them stay, and one more is there while the next is written. A
round's end keeps one for the next round (`training_state`), as hard links where the file system has
them.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from training.resources.asked import Asked
from training.resources.main_memory import print_line
from training.resources.sizes import sizes_of

GB = 1e9  # as disks are sold


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes on disk of one round of Train: at most `kept` checkpoints at a time, and `policies`."""

    checkpoint: float
    kept: int
    policy: float
    policies: int
    carried: bool

    @property
    def peak(self) -> float:
        """The most bytes at any time."""
        return self.kept * self.checkpoint + self.policies * self.policy

    @property
    def left(self) -> float:
        """Bytes that the round leaves: policies, and one checkpoint's states for the next round."""
        return self.policies * self.policy + self.carried * self.checkpoint

    def described(self) -> str:
        """The sizes in GB, as one line."""
        return (
            f"{self.peak / GB:.1f} GB at most ({self.kept} checkpoints of {self.checkpoint / GB:.1f}, "
            f"{self.policies} policies of {self.policy / GB:.1f}), {self.left / GB:.1f} GB of it stay"
        )


def of_disk(asked: Asked) -> DiskNeeds:
    """The disk space of a round.

    FSDP's full states hold the weights twice, in FSDP's format and as safetensors. DeepSpeed's hold
    float32 weights beside the optimizer's states, and rounded ones twice. With LoRA a policy holds
    the adapters alone.
    """
    settings, size, trained = asked.settings, asked.size, asked.trained
    count, lora = sizes_of(asked.policy).count, settings.lora_rank > 0
    if lora:
        checkpoint = trained * (4 + asked.optimizer_bytes)
    elif asked.place.sharding == "deepspeed":
        checkpoint = count * 2 * size + trained * (4 + asked.optimizer_bytes)
    else:
        checkpoint = count * 4 * (2 if asked.place.full else 1) + trained * asked.optimizer_bytes
    times = [every for every in (settings.save_steps, settings.watch_every) if every]
    last, watched = settings.steps, settings.watch_every > 0
    written = {s for every in times for s in range(every, last + 1, every)} | {last}
    most = settings.keep_checkpoints + 1 + watched  # the kept ones, the next one, and the best one
    return DiskNeeds(
        checkpoint=checkpoint,
        kept=min(len(written), most) if last else most,  # with epochs, steps are not known yet
        policy=trained * 4 if lora else count * size,
        policies=1 + watched,
        carried=settings.carry_over,
    )


def check(
    needed: DiskNeeds,
    folder: Path,
    free: float | None = None,
    say: Callable[[str], None] = print_line,
) -> None:
    """`say` how much a round writes; raise StageError where `folder`'s disk has too little room."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    room = float(shutil.disk_usage(folder).free) if free is None else free
    say(f"on disk {needed.described()}, {room / GB:.1f} GB are free")
    if needed.peak > room:
        raise StageError(
            f"training writes up to {needed.peak / GB:.1f} GB ({needed.kept} checkpoints of "
            f"{needed.checkpoint / GB:.1f} GB) and {room / GB:.1f} GB are free below {folder}; what "
            "helps: a smaller [Train] keep_checkpoints, LoRA (lora_rank), or [run] artifacts on "
            "another disk; [Train] check_memory = false tries anyway"
        )
