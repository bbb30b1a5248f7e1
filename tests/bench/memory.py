"""The memory that one training step takes, against what is told before: real widths, few layers.

    python -m tests.bench.memory --json FILE

Qwen2.5-VL with the widths of the 3B model and random weights is trained for two steps by the
real trainer, each case in a process of its own. Taken is the peak of resident memory, of the process
with every library and the weights, which are mapped from their file; told is what Train says before it
loads them. By part: loading, generating, the first batch's comparison, updating. On the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench import results
from tests.conftest import settings_of

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
GIB = 1 << 30
CASES: dict[str, dict[str, Any]] = {
    "lora, 2 layers": {"layers": 2, "vision": 4, "lora": 8},
    "lora, 8 layers": {"layers": 8, "vision": 4, "lora": 8},
    "lora, 4 layers, 32 vision layers": {"layers": 4, "vision": 32, "lora": 8},
    "lora, 4 layers, long": {"layers": 4, "vision": 4, "lora": 8, "completion": 96, "group": 4},
    "lora, 4 layers, nothing recomputed": {"layers": 4, "vision": 4, "lora": 8, "checkpointing": False},
    "full, 2 layers": {"layers": 2, "vision": 4},
    "full, 2 layers, a step of two turns": {"layers": 2, "vision": 2, "turns": 2},
    "full, 4 layers": {"layers": 4, "vision": 2},
    "full, 2 layers, reference": {"layers": 2, "vision": 2, "beta": 0.04},
    "full in float32, 2 layers": {"layers": 2, "vision": 2, "dtype": "float32"},
}  # fmt: skip
DEFAULTS = {
    "lora": 0,
    "dtype": "bfloat16",
    "checkpointing": True,
    "beta": 0.0,
    "completion": 16,
    "group": 2,
    "questions": 2,
    "turns": 1,
    "side": 448,
    "shared": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--case", help="those whose name holds this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(**json.loads(given.child))))
        return
    figures = []
    for name, case in CASES.items():
        if given.case and given.case not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = json.dumps({**DEFAULTS, **case, "folder": folder})
            line = [sys.executable, "-m", "tests.bench.memory", "--child", options]
            done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}:", json.dumps(found), flush=True)
        for what in ("told", "taken", "apart"):
            unit = "%" if what == "apart" else "GiB"
            goal = "within 15" if what == "apart" else "-"
            figures.append(
                {"figure": f"{name}, {what}", "value": found[what], "goal": goal, "unit": unit}
            )
    results.write(given.json, figures, {"model": MODEL, **DEFAULTS})


def write_policy(folder: Path, layers: int, vision: int, side: int, dtype: str) -> None:
    """A policy of the published widths with few layers, and the tiny policy's processor."""
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from training.model import tiny_policy
    from training.model.shapes import config_of

    config, tiny = config_of(MODEL), tiny_policy.config()
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = ["full_attention"] * layers
    config.vision_config.depth = vision
    config.vision_config.fullatt_block_indexes = [vision - 1]
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, key, getattr(tiny, key))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, key, getattr(tiny.text_config, key))
    model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=2, pad_token_id=0)
    processor = tiny_policy.processor([], min_pixels=side**2, max_pixels=side**2)
    tiny_policy.save(model, processor, folder)


def measure(
    folder: str,
    layers: int,
    vision: int,
    lora: int,
    dtype: str,
    checkpointing: bool,
    beta: float,
    completion: int,
    group: int,
    questions: int,
    turns: int,
    side: int,
    shared: bool,
) -> dict[str, Any]:
    """Train a step and return GiB told and taken, in all and by part."""
    import contextlib

    import torch
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig

    from training.loop.trl_settings import of_reference
    from training.model import loading, processors
    from training.resources import gpu_memory, needs
    from training.settings import TrainSettings
    from training.shared_prefix import check
    from training.shared_prefix.trainer import make_trainer

    torch.set_num_threads(2)
    policy = Path(folder) / "policy"
    if not policy.exists():
        if os.fork() == 0:
            write_policy(policy, layers, vision, side, dtype)
            os._exit(0)
        os.wait()
    noise = Image.effect_noise((side, side), 60).convert("RGB")
    rows = [
        {"prompt": [{"role": "user", "content": f"What is this {n}?"}], "image": noise}
        for n in range(2 * questions * turns)
    ]
    settings = settings_of(
        TrainSettings, dtype=dtype, lora_rank=lora, num_generations=group,
        max_completion_length=completion, shared_prefix=shared,
        questions_per_step=questions * turns, micro_batch_size=questions * group, watch_every=0,
    )  # fmt: skip
    config = GRPOConfig(
        output_dir=str(Path(folder) / "out"),
        max_steps=2,
        learning_rate=1e-5,
        num_generations=group,
        max_completion_length=completion,
        per_device_train_batch_size=questions * group,
        gradient_accumulation_steps=turns,
        beta=beta,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=checkpointing,
        report_to="none",
        save_strategy="no",
        shuffle_dataset=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **of_reference(dtype),
    )
    processor = processors.load_processor(policy)
    clock = Phases()
    with contextlib.redirect_stdout(sys.stderr):
        prompt = gpu_memory.size_of_prompts(processor, rows[:2])
        options, place = needs.Options.of(config), needs.Place(cuda=False)
        needed = gpu_memory.of_gpu(needs.Asked(policy, prompt, settings, options, place))
        clock.start()
        model, adapters = loading.load_model(policy, settings)
        trainer = make_trainer(
            model=model,
            shared_prefix=shared,
            args=config,
            processing_class=processor,
            train_dataset=Dataset.from_list(rows),
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            peft_config=adapters,
        )
        del model
        clock.around(trainer, "_generate_single_turn", "generating")
        clock.around(check, "compare", "comparing")
        clock.say("updating")
        trainer.train()
    peaks = clock.stop()
    taken = max(peaks.values())
    told = needed.total / GIB
    return {
        "told": round(told, 2),
        "taken": round(taken, 2),
        "apart": round(100 * (told / taken - 1), 1),
        "parts": needed.described(),
        "peaks": {k: round(v, 2) for k, v in peaks.items()},
        "process": round(clock.base / GIB, 2),
        "seconds": clock.seconds,
    }


class Phases:
    """Peaks of resident memory by phase, sampled."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.phase, self.running = "loading", True
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        self.base = _status("VmRSS")
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        self.since = time.time()

    def say(self, phase: str) -> None:
        now = time.time()
        self.seconds[self.phase] = round(self.seconds.get(self.phase, 0) + now - self.since, 1)
        self.phase, self.since = phase, now

    def around(self, owner: Any, name: str, phase: str) -> None:
        call = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.phase
            self.say(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.say(before)

        setattr(owner, name, watched)

    def stop(self) -> dict[str, float]:
        self.say("end")
        self.running = False
        self.thread.join()
        return self.peaks

    def _watch(self) -> None:
        while self.running:
            held = _status("VmRSS") / GIB
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), held)
            time.sleep(0.002)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
