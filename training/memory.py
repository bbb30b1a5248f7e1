"""How much memory training will take, from the model's config, before a weight is loaded.

What is certain (weights, gradients, optimizer states, the reference model) is counted exactly;
activations and the cache of generation are estimated from the longest of some real prompts. A run
whose certain part does not fit is refused; one that may not fit is told what would help.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tasks import prompts
from tasks.run import StageError
from training import parts
from training.parts import outside_deepspeed

GIB = 1 << 30
QUANTISED = 0.57  # bytes a weight of NF4 with its scales takes (Dettmers et al. 2023, section 3)
# Kept for the backward pass, in hidden states a token and layer: what a transformer layer saves
# without recomputation (34 bytes at two bytes a number, Korthikanti et al. 2022, section 4.1), and
# the one state at its entrance with it.
SAVED, CHECKPOINTED = 17, 1


@dataclass(frozen=True)
class Estimate:
    """Bytes a process needs, by what for."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    activations: float
    generation: float

    @property
    def certain(self) -> float:
        """What must be there whatever is generated."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        return self.certain + self.activations + self.generation

    def told(self) -> str:
        """One line: the parts in GiB, and their sum."""
        listed = [f"{name} {size / GIB:.2f}" for name, size in asdict(self).items() if size]
        return f"{self.total / GIB:.2f} GiB ({', '.join(listed)})"


def estimate(
    policy: Path | str,
    *,
    dtype: str,
    frozen: tuple[str, ...],
    lora_rank: int,
    lora_targets: tuple[str, ...],
    quantized: bool,
    reference: bool,
    optimizer: str,
    checkpointing: bool,
    sequences: int,
    prompt_tokens: int,
    completion_tokens: int,
    shards: int = 1,
) -> Estimate:
    """What a process needs for micro-batches of `sequences` prompts with their completions.

    `policy` is a folder or hub id, of which only the config is read. `shards` is over how many
    processes weights and states are spread (FSDP, ZeRO-3). `optimizer` is TRL's name for it.
    """
    config = AutoConfig.from_pretrained(policy)
    with torch.device("meta"), outside_deepspeed():
        model = AutoModelForImageTextToText.from_config(config)
    belongs = parts.part_of(model)
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # All of the weights are trained: held in float32, with gradients and states, whatever they are
    # computed in. A pass's own copies in bfloat16 come and go.
    held = size if lora_rank else 4
    count = sum(p.numel() for p in model.parameters())
    if lora_rank:
        trained = _adapter_parameters(model, belongs, lora_rank, lora_targets)
    else:
        trained = sum(
            p.numel() for name, p in model.named_parameters() if belongs[name] not in frozen
        )
    text = config.get_text_config()
    tokens = sequences * (prompt_tokens + completion_tokens)
    kept = CHECKPOINTED if checkpointing else SAVED
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Estimate(
        weights=count * (QUANTISED if quantized else held) / shards,
        gradients=trained * 4 / shards,
        optimizer=trained * optimizer_bytes(optimizer, 4) / shards,
        reference=count * size / shards if reference and not lora_rank else 0.0,
        activations=tokens * text.hidden_size * (text.num_hidden_layers * kept + SAVED) * size,
        generation=tokens * text.num_hidden_layers * 2 * heads * head * size,
    )


def check(needed: Estimate, available: float, vllm_share: float = 0.0) -> None:
    """Say what training will take; `vllm_share` of the memory is a colocated vLLM's.

    Raises StageError when what is certain exceeds what is there.
    """
    room = available * (1 - vllm_share)
    print(f"train: about {needed.told()} of {room / GIB:.2f} GiB", flush=True)
    helps = (
        "LoRA ([Train] lora_rank), a smaller micro_batch_size, gradient_checkpointing in trl, "
        "dtype = bfloat16, or more processes that share the weights (training/recipes)"
    )
    if needed.certain > room:
        raise StageError(
            f"training needs at least {needed.certain / GIB:.2f} GiB a process and there are "
            f"{room / GIB:.2f} GiB; what helps: {helps}; [Train] check_memory = false tries anyway"
        )
    if needed.total > 0.9 * room:
        print(f"train: that may be too much; what helps: {helps}", flush=True)


def available_memory() -> float:
    """Bytes a process may take: of its GPU, else of the machine or its container."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    free = _meminfo("MemAvailable")
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, float(limit.read_text()) - float(used.read_text()))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def longest_prompt(processor: Any, rows: list[dict[str, Any]]) -> int:
    """Tokens of the longest of some prompts, image included."""
    texts = [prompts.rendered(processor, prompts.chat(row["prompt"][0]["content"])) for row in rows]
    images = [[row["image"]] for row in rows]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    return int(inputs["input_ids"].shape[1])


def _adapter_parameters(
    model: torch.nn.Module, belongs: dict[str, str], rank: int, targets: tuple[str, ...]
) -> int:
    output = model.get_output_embeddings()  # type: ignore[operator]
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not output
        and belongs[f"{name}.weight"] in targets
    )


def optimizer_bytes(name: str, size: int) -> float:
    """Bytes of state a trained weight has: two numbers for AdamW, one byte each in its 8-bit form."""
    if "8bit" in name:
        return 2.0
    if "adafactor" in name:
        return 0.01 * size
    return 1.0 * size if name.startswith(("sgd", "lion", "muon")) else 2.0 * size


def _meminfo(key: str) -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return float("inf")
