"""How much disk training takes, before its first step: numbers only, nothing is loaded.

A checkpoint holds the weights that are trained and the optimizer's states; of full fine-tuning in
bfloat16 both in float32. Some are kept, one more is there while the next is written, and the round's
end keeps one for the next round (`handover`), linked and not copied where the file system can.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from training.resources.asked import Asked
from training.resources.main_memory import told
from training.resources.sizes import sizes_of

GB = 1e9  # as disks are sold


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes that one round of Train writes: `kept` checkpoints at most at a time, and policies."""

    checkpoint: float
    kept: int
    policy: float
    policies: int
    carried: bool

    @property
    def peak(self) -> float:
        """The most that lies there at a time."""
        return self.kept * self.checkpoint + self.policies * self.policy

    @property
    def left(self) -> float:
        """What remains of the round: policies, and one checkpoint's states for the next round."""
        return self.policies * self.policy + self.carried * self.checkpoint

    def told(self) -> str:
        """One line in GB."""
        return (
            f"{self.peak / GB:.1f} GB at most ({self.kept} checkpoints of {self.checkpoint / GB:.1f}, "
            f"{self.policies} policies of {self.policy / GB:.1f}), {self.left / GB:.1f} GB of it stay"
        )


def of_disk(asked: Asked) -> DiskNeeds:
    """What a round writes.

    FSDP's full states hold the weights twice, in a form of their own and as safetensors; DeepSpeed's
    hold exact ones beside the optimizer's states, and rounded ones twice. Adapters are a policy by
    themselves.
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
    most = settings.keep_checkpoints + 1 + watched  # the newest, the next, the best
    return DiskNeeds(
        checkpoint=checkpoint,
        kept=min(len(written), most),
        policy=trained * 4 if lora else count * size,
        policies=1 + watched,
        carried=settings.carry_over,
    )


def check(
    needed: DiskNeeds,
    folder: Path,
    free: float | None = None,
    say: Callable[[str], None] = told,
) -> None:
    """`say` what a round will write, and raise StageError where it does not fit beside `folder`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    room = float(shutil.disk_usage(folder).free) if free is None else free
    say(f"on disk {needed.told()}, {room / GB:.1f} GB are free")
    if needed.peak > room:
        raise StageError(
            f"training writes up to {needed.peak / GB:.1f} GB ({needed.kept} checkpoints of "
            f"{needed.checkpoint / GB:.1f} GB) and {room / GB:.1f} GB are free below {folder}; what "
            "helps: a smaller [Train] keep_checkpoints, LoRA (lora_rank), or [run] artifacts on "
            "another disk; [Train] check_memory = false tries anyway"
        )
