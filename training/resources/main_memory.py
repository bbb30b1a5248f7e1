"""Estimates the main memory of a training's processes on one machine, beside their GPUs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from tasks.runtime.errors import StageError
from training.resources.asked import Asked
from training.resources.sizes import sizes_of

GIB = 1 << 30
HOST = 2.0 * GIB  # a process with libraries and the GPU's driver; its vLLM needs as much again
SHARD = 5e9  # bytes of one weight file; DeepSpeed's processes read one at a time
# Bytes of offloaded states for each weight, by DeepSpeed's rule (its docs, "Memory requirements"): 16,
# times 1.5 for buffers.
STATES = 16 * 1.5


@dataclass(frozen=True)
class MainMemory:
    """The bytes of main memory that the processes of one machine need, by purpose."""

    processes: float
    states: float  # offloaded optimizer states
    base: float  # copies of the weights below adapters (training.model.trainable.BaseKeeper)
    loading: float  # the model while it is loaded
    saving: float  # a checkpoint that one process gathers

    @property
    def total(self) -> float:
        """The most bytes at any time: loading and saving never coincide."""
        return self.processes + self.states + self.base + max(self.loading, self.saving)

    def described(self) -> str:
        """The sum and the parts in GiB, as one line."""
        listed = [f"{name} {size / GIB:.1f}" for name, size in asdict(self).items() if size]
        return f"{self.total / GIB:.1f} GiB of main memory ({', '.join(listed)})"


def of_main_memory(asked: Asked) -> MainMemory:
    """The main memory that the processes of one machine need.

    With FSDP one process a machine loads the whole model, and with full states one process gathers
    it. Otherwise each process loads it.
    """
    place, sizes, settings = asked.place, sizes_of(asked.policy), asked.settings
    size, trained = asked.size, asked.trained
    below = sum(sizes.adapted[part] for part in settings.adapted) if asked.options.use_vllm else 0
    held = size if settings.lora_rank else 4
    loading = {
        "fsdp": sizes.count * held,
        "deepspeed": place.local * min(sizes.count * size, SHARD),
    }
    gathered = max(sizes.count * held, trained * asked.optimizer_bytes)
    return MainMemory(
        processes=place.local * (HOST + asked.colocated * HOST),
        states=STATES * trained / place.machines if place.offloaded else 0.0,
        base=float(place.local * below * size),
        loading=float(loading.get(place.sharding, place.local * sizes.count * held)),
        saving=float(gathered) if place.full else 0.0,
    )


def print_line(sentence: str) -> None:
    """Print a sentence as a line of the stage Train."""
    print(f"train: {sentence}", flush=True)


def check_main(needed: MainMemory, free: float, say: Callable[[str], None] = print_line) -> None:
    """`say` how much main memory is needed; raise StageError where it exceeds the `free` bytes."""
    say(f"about {needed.described()}, {free / GIB:.1f} GiB are free")
    if needed.total > free:
        raise StageError(
            f"training needs about {needed.described()} and {free / GIB:.1f} GiB are free; what helps: "
            "fewer processes a machine, LoRA ([Train] lora_rank), or states that stay on the GPUs "
            "(training/recipes); [Train] check_memory = false tries anyway"
        )
