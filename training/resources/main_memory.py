"""How much main memory the processes of a training take on one machine, beside their GPUs."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.runtime.errors import StageError
from training.resources.asked import Asked
from training.resources.sizes import sizes_of

GIB = 1 << 30
HOST = 2.0 * GIB  # a process with its libraries and a GPU's driver, and as much its vLLM
SHARD = 5e9  # bytes of one file of weights, of which DeepSpeed's processes read one at a time
# Bytes a weight of states in main memory: DeepSpeed's own rule (its docs, "Memory requirements"), 16
# with room for buffers of 1.5.
STATES = 16 * 1.5


@dataclass(frozen=True)
class MainMemory:
    """Bytes that the processes of one machine need of its main memory, beside their GPUs."""

    processes: float
    states: float  # the optimizer's, where they are kept off the GPU
    base: float  # weights below adapters, kept exact (training.model.trainable.BaseKeeper)
    loading: float  # the model on its way to the GPUs
    saving: float  # a checkpoint that one process gathers

    @property
    def total(self) -> float:
        """The most at any time: nothing is loaded while something is saved."""
        return self.processes + self.states + self.base + max(self.loading, self.saving)

    def told(self) -> str:
        """One line: the parts in GiB, and their sum."""
        listed = [f"{name} {size / GIB:.1f}" for name, size in asdict(self).items() if size]
        return f"{self.total / GIB:.1f} GiB of main memory ({', '.join(listed)})"


def of_main_memory(asked: Asked) -> MainMemory:
    """What one machine's processes take of its main memory, beside GPUs.

    FSDP has one process a machine load the whole model, and with full states one process gather it;
    otherwise each process loads it by itself.
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


def told(sentence: str) -> None:
    """Print it as a line of training's."""
    print(f"train: {sentence}", flush=True)


def check_main(needed: MainMemory, free: float, say: Callable[[str], None] = told) -> None:
    """`say` what a machine's processes take of its main memory; StageError where it is not there."""
    say(f"about {needed.told()}, {free / GIB:.1f} GiB are free")
    if needed.total > free:
        raise StageError(
            f"training needs about {needed.told()} and {free / GIB:.1f} GiB are free; what helps: "
            "fewer processes a machine, LoRA ([Train] lora_rank), or states that stay on the GPUs "
            "(training/recipes); [Train] check_memory = false tries anyway"
        )


def free_main_memory() -> float:
    """Bytes of main memory that are free on this machine, or in its container."""
    free = meminfo("MemAvailable")
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free


def meminfo(key: str) -> float:
    """Bytes that the system tells under this name; infinity where it tells nothing."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return float("inf")
