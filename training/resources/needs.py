"""What a round of Train needs of its machine, from its settings: GPU, main memory, disk.

Before a run it is asked of the settings and a launcher's file, in a run of the very configuration:
both make an `Asked` and a `Place`, and the same functions answer. Nothing is loaded but a config.
"""

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from training.model.sharding import launched_with
from training.resources import disk, gpu_memory, main_memory, vllm_memory
from training.resources.sizes import sizes_of
from training.settings import TrainSettings
from training.shared_prefix.forward import PREFIX_MODELS

ADAMW = "adamw_torch_fused"  # what TRL takes where nothing is said


@dataclass(frozen=True)
class Options:
    """TRL's options that decide what is needed, with TRL's defaults."""

    beta: float = 0.0
    optim: str = ADAMW
    gradient_checkpointing: bool = False
    steps_per_generation: int = 0  # 0: as many as micro-batches make a step
    use_vllm: bool = False
    vllm_mode: str = "colocate"
    vllm_gpu_memory_utilization: float = 0.3
    vllm_max_model_length: int | None = None
    vllm_tensor_parallel_size: int = 1
    vllm_enable_sleep_mode: bool = False

    @classmethod
    def of(cls, source: Any) -> "Options":
        """Of the setting `trl`, or of TRL's own configuration."""
        read = source.get if isinstance(source, dict) else lambda key: getattr(source, key, None)
        found = {field.name: read(field.name) for field in fields(cls)}
        found["optim"] = getattr(found["optim"], "value", found["optim"])
        return cls(**{key: value for key, value in found.items() if value is not None})


@dataclass(frozen=True)
class Place:
    """The processes of a training: how many in all and a machine, what is spread over them, by what.

    `sharding` is "", "fsdp" or "deepspeed"; `offloaded`, whether optimizer states lie in main memory;
    `full`, whether FSDP gathers a checkpoint on one process.
    """

    processes: int = 1
    machines: int = 1
    sharding: str = ""
    offloaded: bool = False
    full: bool = False
    cuda: bool = True

    @property
    def shards(self) -> int:
        return self.processes if self.sharding else 1

    @property
    def local(self) -> int:
        """Processes on one machine."""
        return max(1, self.processes // self.machines)

    @classmethod
    def of_process(cls, config: Any, cuda: bool) -> "Place":
        """Of this process, as its launcher set it up; `config` is TRL's."""
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
        """Of [Train] launcher: accelerate with a configuration file, or torchrun; paths from `root`.

        Raises OSError where the file cannot be read.
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
        given = int(option("--num_processes") or 0) or each * machines
        fsdp, deepspeed = read.get("fsdp_config") or {}, read.get("deepspeed_config") or {}
        return cls(
            processes=given or int(read.get("num_processes") or 1),
            machines=machines,
            sharding={"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}.get(
                str(read.get("distributed_type")), ""
            ),
            offloaded=deepspeed.get("offload_optimizer_device") == "cpu",
            full=fsdp.get("fsdp_state_dict_type") == "FULL_STATE_DICT",
        )


@dataclass(frozen=True)
class Asked:
    """A training: `prompt` are the tokens of the longest prompt, and how many of them are the image's.

    `policy` is a folder or hub id.
    """

    policy: Path | str
    prompt: tuple[int, int]
    settings: TrainSettings
    options: Options
    place: Place
    supervised: bool = False

    @property
    def turns(self) -> int:
        """Micro-batches of a process that make a step."""
        each = 1 if self.supervised else self.settings.num_generations
        batch = self.settings.questions_per_step * each
        return max(1, batch // (self.settings.micro_batch_size * self.place.processes))

    @property
    def at_once(self) -> int:
        """Completions that one process asks for at a time: those of all turns of a batch."""
        return self.settings.micro_batch_size * (self.options.steps_per_generation or self.turns)

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        settings = self.settings
        sizes = sizes_of(self.policy)
        return sizes.trained(settings.frozen, settings.lora_rank, settings.adapted)

    @property
    def colocated(self) -> bool:
        """Whether vLLM generates beside the trainer, on the same GPU."""
        mode = self.options.vllm_mode
        return self.options.use_vllm and mode == "colocate" and not self.supervised


def of_gpu(asked: Asked) -> gpu_memory.Estimate:
    """What the trainer takes of a GPU, or of a machine without one, a process."""
    settings, options, place = asked.settings, asked.options, asked.place
    samples = not asked.supervised
    group = settings.num_generations if samples else 1
    shared, limit = settings.shared_prefix, settings.tokens_per_micro_batch
    return gpu_memory.estimate(
        asked.policy,
        dtype=settings.dtype,
        frozen=settings.frozen,
        lora_rank=settings.lora_rank,
        lora_targets=settings.adapted,
        quantized=settings.quantized,
        reference=samples and options.beta != 0.0,
        optimizer=options.optim,
        checkpointing=options.gradient_checkpointing,
        sequences=settings.micro_batch_size,
        prompt_tokens=asked.prompt[0],
        completion_tokens=settings.max_completion_length if samples else 64,
        image_tokens=asked.prompt[1],
        group=group if shared else 1,
        shared=shared and sizes_of(asked.policy).kind in PREFIX_MODELS,
        pass_limit=limit if shared else 0,
        generated=asked.at_once if samples and not options.use_vllm else 0,
        turns=asked.turns + bool(limit and shared),
        shards=place.shards,
        sharding=place.sharding,
        offloaded=place.offloaded,
        cuda=place.cuda,
    )


def of_vllm(asked: Asked) -> vllm_memory.VllmNeeds | None:
    """What a colocated vLLM takes of each GPU; None where there is none."""
    if not asked.colocated:
        return None
    options, longest = asked.options, asked.prompt[0] + asked.settings.max_completion_length
    tensor_parallel = options.vllm_tensor_parallel_size
    return vllm_memory.vllm_needs(
        asked.policy,
        max_length=options.vllm_max_model_length or longest,
        sequences=asked.at_once * tensor_parallel,
        dtype=asked.settings.dtype,
        tensor_parallel=tensor_parallel,
    )


def of_disk(asked: Asked) -> disk.DiskNeeds:
    """What the round writes."""
    return disk.disk_needs(
        asked.settings,
        count=sizes_of(asked.policy).count,
        trained=asked.trained,
        optimizer_bytes=gpu_memory.optimizer_bytes(asked.options.optim),
        sharding=asked.place.sharding,
        full=asked.place.full,
    )


def of_main_memory(asked: Asked) -> main_memory.MainMemory:
    """What one machine's processes take of its main memory, beside GPUs."""
    settings, place, sizes = asked.settings, asked.place, sizes_of(asked.policy)
    kept = sum(sizes.adapted[part] for part in settings.adapted)
    return main_memory.main_memory(
        count=sizes.count,
        trained=asked.trained,
        size=4 if settings.dtype == "float32" else 2,
        lora=bool(settings.lora_rank),
        kept=kept if asked.options.use_vllm else 0,
        optimizer_bytes=gpu_memory.optimizer_bytes(asked.options.optim),
        local=place.local,
        machines=place.machines,
        sharding=place.sharding,
        offloaded=place.offloaded,
        full=place.full,
        vllm=asked.colocated,
    )


def check(
    base: Path,
    processor: Any,
    row: dict[str, Any],
    config: Any,
    settings: TrainSettings,
    output: Path,
) -> None:
    """Say what training takes of GPU, main memory and disk, and refuse what can't fit.

    Prompts are as long as that of `row`; the disk is that of the folder `output`.
    """
    import torch

    cuda = torch.cuda.is_available()
    asked = Asked(
        base,
        gpu_memory.size_of_prompts(processor, [row]),
        settings,
        Options.of(config),
        Place.of_process(config, cuda),
        supervised=not hasattr(config, "num_generations"),
    )
    available, share = gpu_memory.available_memory(), 0.0
    if (engine := of_vllm(asked)) and cuda:
        asked_share, total = asked.options.vllm_gpu_memory_utilization, gpu_memory.total_memory()
        share = vllm_memory.check_vllm(engine, asked_share, total)
    gpu_memory.check(of_gpu(asked), available, share, asked.options.vllm_enable_sleep_mode)
    if cuda:
        main_memory.check_main(of_main_memory(asked), main_memory.free_main_memory())
    disk.check(of_disk(asked), output)
