"""The input of every estimate: a training's model, settings, TRL options and processes."""

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from training.model.sharding import launched_with
from training.resources.sizes import sizes_of
from training.settings import TrainSettings
from training.shared_prefix.forward import PREFIX_MODELS

ADAMW = "adamw_torch_fused"  # TRL's default
TAUGHT = 64  # tokens of a completion in supervised training
ANSWERED = 32  # val images that the trainer's model answers at a time


@dataclass(frozen=True)
class Options:
    """TRL's options that the estimates depend on, with TRL's defaults."""

    beta: float = 0.0
    optim: str = ADAMW
    gradient_checkpointing: bool = False
    steps_per_generation: int = 0  # 0: the number of micro-batches in a step
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False

    @classmethod
    def of(cls, source: Any) -> "Options":
        """The options in `source`, which is the setting `trl` or TRL's own configuration."""
        read = source.get if isinstance(source, dict) else lambda key: getattr(source, key, None)
        values = {field.name: read(field.name) for field in fields(cls)}
        values["optim"] = getattr(values["optim"], "value", values["optim"])
        return cls(**{key: value for key, value in values.items() if value is not None})


@dataclass(frozen=True)
class Place:
    """The processes of a training, on how many machines, and how they shard the model.

    `sharding` is "", "fsdp" or "deepspeed". `offloaded` says whether optimizer states are in main
    memory, and `full` whether FSDP gathers a checkpoint on one process.
    """

    processes: int = 1
    machines: int = 1
    sharding: str = ""
    offloaded: bool = False
    full: bool = False
    cuda: bool = True

    @property
    def shards(self) -> int:
        """Processes over which the model is sharded; 1: each has the whole model."""
        return self.processes if self.sharding else 1

    @property
    def local(self) -> int:
        """Processes on one machine."""
        return max(1, self.processes // self.machines)

    @classmethod
    def of_process(cls, config: Any, cuda: bool) -> "Place":
        """The processes that the launcher started, read in one of them; `config` is TRL's."""
        world = int(config.world_size)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        sharding = ""
        if getattr(config, "fsdp", None) or launched_with("FSDP"):
            sharding = "fsdp"
        if config.deepspeed or launched_with("DEEPSPEED"):
            sharding = "deepspeed"
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        full = os.environ.get("FSDP_STATE_DICT_TYPE", "") == "FULL_STATE_DICT"
        return cls(world, max(1, world // local), sharding, offload == "cpu", full, cuda)

    @classmethod
    def of_launcher(cls, launcher: str, root: Path = Path()) -> "Place":
        """The processes of [Train] launcher: accelerate with a configuration file, or torchrun.

        Paths are relative to `root`. Raises OSError where the file cannot be read.
        """
        words = [word for part in shlex.split(launcher) for word in part.split("=", 1)]

        def option(*names: str) -> str:
            at = next((words.index(name) + 1 for name in names if name in words), len(words))
            return words[at] if at < len(words) else ""

        read: dict[str, Any] = {}
        if file := option("--config_file"):
            import yaml

            read = yaml.safe_load((root / file).read_text(encoding="utf-8")) or {}
        machines = int(option("--num_machines", "--nnodes") or read.get("num_machines") or 1)
        each = int(option("--nproc_per_node", "--nproc-per-node") or 0)
        processes = int(option("--num_processes") or 0) or each * machines
        fsdp, deepspeed = read.get("fsdp_config") or {}, read.get("deepspeed_config") or {}
        return cls(
            processes=processes or int(read.get("num_processes") or 1),
            machines=machines,
            sharding={"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(
                str(read.get("distributed_type")), ""
            ),
            offloaded=deepspeed.get("offload_optimizer_device") == "cpu",
            full=fsdp.get("fsdp_state_dict_type") == "FULL_STATE_DICT",
        )


@dataclass(frozen=True)
class Asked:
    """A training whose needs are estimated.

    `policy` is a folder or hub id. `prompt` has the tokens of the longest prompt, and how many of them
    are the image's.
    """

    policy: Path | str
    prompt: tuple[int, int]
    settings: TrainSettings
    options: Options
    place: Place
    supervised: bool = False

    @property
    def turns(self) -> int:
        """Micro-batches of one process in a step."""
        batch = self.settings.questions_per_step * self.group
        return max(1, batch // (self.settings.micro_batch_size * self.place.processes))

    @property
    def passes(self) -> int:
        """Forward and backward passes in a step, one more where their tokens are bounded."""
        return self.turns + bool(self.pass_limit)

    @property
    def at_once(self) -> int:
        """Completions of one process in a generation batch."""
        return self.settings.micro_batch_size * (self.options.steps_per_generation or self.turns)

    @property
    def groups(self) -> int:
        """Questions of one process in a generation batch."""
        return -(-self.at_once // self.group)

    @property
    def generated(self) -> list[tuple[int, int]]:
        """Batches that the trainer's model generates: (prompts, completions), for training and validation.

        There are none where vLLM generates.
        """
        if self.options.use_vllm and not self.supervised:
            return []
        each = -(-self.settings.watch_images // self.place.processes) * bool(
            self.settings.watch_every
        )
        batches = [(min(ANSWERED, each),) * 2, (self.groups, self.at_once)]
        return batches[: 1 if self.supervised else 2]

    @property
    def branches(self) -> bool:
        """Whether completions are generated from one copy of their prompt (`training.shared_prefix.rollouts`)."""
        whole = not self.supervised and not self.place.sharding
        return whole and self.settings.shared_prefix and sizes_of(self.policy).branches

    @property
    def completion_tokens(self) -> int:
        """Tokens of the longest completion."""
        return TAUGHT if self.supervised else self.settings.max_completion_length

    @property
    def group(self) -> int:
        """Completions of one question."""
        return 1 if self.supervised else self.settings.num_generations

    @property
    def shared(self) -> bool:
        """Whether a group's prompt and image are computed once."""
        return self.settings.shared_prefix and sizes_of(self.policy).kind in PREFIX_MODELS

    @property
    def pass_limit(self) -> int:
        """The bound on the tokens of one pass; 0: none."""
        return self.settings.tokens_per_micro_batch if self.settings.shared_prefix else 0

    @property
    def size(self) -> int:
        """Bytes of a number in the precision of computation."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def trained(self) -> int:
        """The number of trained weights."""
        settings = self.settings
        sizes = sizes_of(self.policy)
        return sizes.trained(settings.frozen, settings.lora_rank, settings.adapted)

    @property
    def optimizer_bytes(self) -> float:
        """Bytes of the optimizer's state for each trained weight."""
        return optimizer_bytes(self.options.optim)

    @property
    def colocated(self) -> bool:
        """Whether vLLM generates on the trainer's GPU."""
        mode = self.options.vllm_mode
        return self.options.use_vllm and mode == "colocate" and not self.supervised


def optimizer_bytes(name: str) -> float:
    """Bytes of an optimizer's state for each weight: AdamW has two numbers, of 4 bytes or of 1."""
    if "8bit" in name:
        return 2.0
    if "adafactor" in name:
        return 0.04
    return 4.0 if name.startswith(("sgd", "lion", "muon")) else 8.0
