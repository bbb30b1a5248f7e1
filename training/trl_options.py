"""The options of TRL that [Train] trl may set: their names, and the bounds of some.

They are checked with luigi.cfg, before any stage runs, and there TRL is not imported: that takes seconds.
`training.loop.trl_settings` checks the types of the others.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.runtime.settings import Rule, mistyped, nearest

# Options of GRPOConfig with bounds or choices, which TRL checks late or never.
_SHARE = Rule(at_least=0, at_most=1)
_SIZE, _COUNT, _POSITIVE = Rule(at_least=0), Rule(at_least=1), Rule(above=0)
TRL_RULES: dict[str, tuple[Any, Rule]] = {
    "temperature": (float, _POSITIVE),
    "top_p": (float, Rule(above=0, at_most=1)),
    "top_k": (int, _SIZE),
    "min_p": (float | None, _SHARE),
    "repetition_penalty": (float, _POSITIVE),
    "beta": (float, _SIZE),
    "epsilon": (float, _SIZE),
    "epsilon_high": (float | None, _SIZE),
    "num_iterations": (int, _COUNT),
    "steps_per_generation": (int | None, _COUNT),
    "generation_batch_size": (int | None, _COUNT),
    "top_entropy_quantile": (float, _SHARE),
    "max_grad_norm": (float, _SIZE),
    "warmup_steps": (float, _SIZE),
    "weight_decay": (float, _SIZE),
    "adam_beta1": (float, _SHARE),
    "adam_beta2": (float, _SHARE),
    "adam_epsilon": (float, _POSITIVE),
    "vllm_gpu_memory_utilization": (float, Rule(above=0, at_most=1)),
    "vllm_tensor_parallel_size": (int, _COUNT),
    "vllm_max_model_length": (int | None, _COUNT),
    "loss_type": (
        str,
        Rule(choices=("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
    ),
    "scale_rewards": (str, Rule(choices=("group", "batch", "none"))),
    "importance_sampling_level": (str, Rule(choices=("token", "sequence"))),
    "multi_objective_aggregation": (
        str,
        Rule(choices=("sum_then_normalize", "normalize_then_sum")),
    ),
    "vllm_mode": (str, Rule(choices=("colocate", "server"))),
    "vllm_importance_sampling_mode": (
        str,
        Rule(choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
    ),
}
# Options that other keys of [Train] set.
OURS = {
    "output_dir",
    "max_steps",
    "learning_rate",
    "num_generations",
    "max_completion_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "save_steps",
    "save_total_limit",
    "reward_weights",
    "report_to",
    "push_to_hub",
    # The recorder, resuming and the order of questions depend on these.
    "logging_steps",
    "save_only_model",
    "save_strategy",
    "ignore_data_skip",
    "shuffle_dataset",
    "eval_strategy",
}
# The files that declare all options of GRPOConfig and SFTConfig, by package.
SOURCES = {
    "trl": ("trainer/grpo_config.py", "trainer/sft_config.py", "trainer/base_config.py"),
    "transformers": ("training_args.py",),
}


def problem(trl: Mapping[str, Any]) -> str:
    """What is wrong with the first option that cannot be used, in words; empty where all can be."""
    names = known()
    for name, value in trl.items():
        if name in OURS:
            return f"{name!r} is set by another key of [Train]"
        if names and name not in names:
            return f"TRL has no option {name!r}{nearest(name, names)}"
        kind, rule = TRL_RULES.get(name, (Any, Rule()))
        if name == "scale_rewards" and isinstance(value, bool):
            continue  # of TRL's former versions, for group and none
        if why := mistyped(value, kind) or (value is not None and rule.refusal(value)):
            return f"{name} {why}"
    return ""


@lru_cache(maxsize=1)
def known() -> frozenset[str]:
    """The names of TRL's options, read from its source in two milliseconds; empty where it is not installed."""
    names: set[str] = set()
    for package, files in SOURCES.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return frozenset()
        for file in files:
            text = (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
            names.update(re.findall(r"^    (\w+):", text, re.MULTILINE))
    return frozenset(names)
