"""Checks whether the stages of a run fit a machine's GPUs, main memory and disk, before they run.

The machine is given on the command line, or by a comment in an overlay:

    # machine: 8 x 80 GB, 500 GB main memory

This means 8 GPUs of 80 GB each. A GB is 10^9 bytes. Main memory counts for each machine, and may be
left out.
"""

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import tasks
from pipeline.methods import method_of
from pipeline.settings import run
from pipeline.stage import Stage

GB, GIB = 1e9, 1 << 30
TOKEN = 4  # bytes of text for each token, before compression
NAMED = re.compile(r"^# machine: (\d+) x (\d+) GB(?:, (\d+) GB main memory)?$", re.MULTILINE)
SHARE = "[engine] gpu_memory_utilization"


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run, with `gpu` bytes each; `main` is the main memory in bytes, 0: unknown."""

    gpus: int
    gpu: float
    main: float = 0.0


@dataclass(frozen=True)
class Fit:
    """Whether a stage fits the machine (None: not known), and the reason in a sentence."""

    stage: str
    fits: bool | None
    reason: str


def machine_of(files: Sequence[str], gpus: int = 0, gpu_gb: float = 0) -> Machine | None:
    """The machine that the last overlay names. `gpus` and `gpu_gb` above 0 override it."""
    named = [m for f in files for m in NAMED.findall(Path(f).read_text(encoding="utf-8"))]
    count, size, main = named[-1] if named else (0, 0, 0)
    gpus, gpu_gb = gpus or int(count), gpu_gb or float(size)
    if gpu_gb and not gpus:
        gpus = 1
    return Machine(gpus, gpu_gb * GB, float(main or 0) * GB) if gpu_gb else None


def asked_of(train: Any, prompt: tuple[int, int]) -> Any:
    """The inputs of the memory estimates for a stage Train.

    `prompt` is (tokens of the longest prompt, those of the image among them). Raises StageError when
    the launcher's file cannot be read.
    """
    from tasks.runtime.errors import StageError
    from training.resources import needs

    try:
        place = needs.Place.of_launcher(train.launcher)
    except (OSError, ValueError) as error:
        raise StageError(f"[Train] launcher = {train.launcher}: {error}") from error
    options = needs.Options.of(train.settings.trl)
    supervised = method_of(train.method).supervised
    model = model_of(train.base())
    return needs.Asked(model, prompt, train.settings, options, place, supervised)


def shares(train: Any) -> bool:
    """Whether a stage Train reads a group's prompt once; False where the policy's config is not known."""
    from tasks.runtime.errors import StageError

    try:
        return bool(asked_of(train, (0, 0)).shared)
    except StageError:
        return False


def memory(train: Any | None, prompt: tuple[int, int]) -> dict[str, Any]:
    """The GPU memory of a process of Train, in GiB by part, or the reason why it is not known."""
    from tasks.runtime.errors import StageError
    from training.resources import gpu_memory

    if train is None:
        return {}
    try:
        needed = gpu_memory.of_gpu(asked_of(train, prompt))
    except StageError as error:
        return {"how": f"unknown: {error}"}
    gib = {name: amount / GIB for name, amount in asdict(needed).items()}
    how = "from the model's config, for one process"
    return {"gib": {**gib, "total": needed.total / GIB}, "how": how}


def fits(
    stages: Sequence[Stage], train: Any | None, prompt: tuple[int, int], machine: Machine | None
) -> list[Fit]:
    """Check Propose, Train and Evaluate. Without a machine, the reasons give only their needs."""
    from tasks.runtime.errors import StageError
    from training.resources.sizes import sizes_of

    results, unknown = [], ""
    try:
        sizes_of(model_of(next(s for s in stages if isinstance(s, tasks.BasePolicy))))
    except StageError as error:
        unknown = str(error)
    for kind in (tasks.Propose, tasks.Train, tasks.Evaluate):
        if not any(isinstance(stage, kind) for stage in stages):
            continue
        name = kind.__name__
        if unknown:
            results.append(Fit(name, None, unknown))
            continue
        try:
            reason = (
                _train(asked_of(train, prompt), machine)
                if kind is tasks.Train
                else _engine(stages, machine)
            )
            results.append(Fit(name, None if machine is None else True, reason))
        except Unknown as why:
            results.append(Fit(name, None, str(why)))
        except StageError as error:
            results.append(Fit(name, False if machine else None, str(error)))
    return results


class Unknown(Exception):
    """Whether a stage fits cannot be estimated; the message says why."""


def _engine(stages: Sequence[Stage], machine: Machine | None) -> str:
    """The engine's memory needs, in a sentence. Raises StageError when it does not fit."""
    from training.resources import vllm_memory

    engine = tasks.engine().settings
    if engine.backend not in ("vllm", "ray"):
        raise Unknown(f"the engine is {engine.backend}, which is not looked at")
    base = next(s for s in stages if isinstance(s, tasks.BasePolicy))
    needed = vllm_memory.vllm_needs(
        model_of(base),
        max_length=engine.max_model_len,
        sequences=engine.max_num_seqs,
        dtype=engine.dtype,
        tensor_parallel=engine.tensor_parallel_size,
        batched_tokens=engine.max_num_batched_tokens,
    )
    if machine is None:
        return needed.described()
    vllm_memory.check_vllm(needed, engine.gpu_memory_utilization, machine.gpu, SHARE, say=_quiet)
    share = engine.gpu_memory_utilization * machine.gpu
    return f"{needed.described()}; {SHARE} gives {share / GIB:.2f}"


def _train(asked: Any, machine: Machine | None) -> str:
    """The memory needs of Train with its vLLM, in a sentence. Raises StageError when they do not fit."""
    from tasks.runtime.errors import StageError
    from training.resources import gpu_memory, main_memory, needs, vllm_memory

    needed, engine, main = (
        gpu_memory.of_gpu(asked),
        needs.of_vllm(asked),
        main_memory.of_main_memory(asked),
    )
    parts = [
        f"{needed.described()} a process",
        *([engine.described()] if engine else []),
        main.described(),
    ]
    if machine is None:
        return "; ".join(parts)
    if asked.place.processes > machine.gpus:
        raise StageError(
            f"[Train] launcher starts {asked.place.processes} processes and there are "
            f"{machine.gpus} GPUs"
        )
    share = 0.0
    if engine:
        utilization = asked.options.vllm_gpu_memory_utilization
        share = vllm_memory.check_vllm(engine, utilization, machine.gpu, say=_quiet)
    sleeps = asked.options.vllm_enable_sleep_mode
    gpu_memory.check(needed, machine.gpu, share, sleeps, say=_quiet)
    room = machine.gpu - (0.0 if sleeps else share)
    if needed.total > room:
        raise StageError(
            f"training takes about {needed.described()} a process and there are {room / GIB:.2f} GiB"
        )
    if machine.main:
        main_memory.check_main(main, machine.main, say=_quiet)
    return "; ".join([*parts, f"{room / GIB:.2f} GiB are there for a process"])


def disk(
    stages: Sequence[Stage],
    prompt: tuple[int, int],
    work: Sequence[Any],
    pictures: dict[str, float | None],
) -> dict[str, Any]:
    """The GB that the stages of a run write, by stage: 0 for a finished stage, None where unknown.

    `work` is that of the plan; `pictures` are the GB of images in Download and BuildMCQ, by task id.
    Train counts the files that remain of earlier rounds, and the peak of
    the last one.
    """
    from tasks.runtime.errors import StageError
    from training.resources.disk import of_disk
    from training.resources.sizes import sizes_of

    sizes: dict[str, float | None] = {}
    texts = {one.stage: one.tokens_out * TOKEN / GB for one in work}
    trains = [s for s in stages if isinstance(s, tasks.Train)]
    how = ""
    for stage in stages:
        name = stage.task_family
        with contextlib.suppress(OSError):
            if stage.folder.is_dir():
                continue
        try:
            if isinstance(stage, tasks.Train):
                needed = of_disk(asked_of(stage, prompt))
                how = needed.described()
                size = (needed.peak if stage is trains[-1] else needed.left) / GB
            elif isinstance(stage, tasks.BasePolicy):
                bytes_of = 4 if stage.settings.dtype == "float32" else 2
                size = sizes_of(model_of(stage)).count * bytes_of / GB
            elif stage.task_id in pictures:
                known, before = pictures[stage.task_id], sizes.get(name, 0.0)
                sizes[name] = None if known is None or before is None else before + known
                continue
            elif isinstance(stage, tasks.Propose | tasks.Evaluate):
                size = sum(gb for of, gb in texts.items() if of.startswith(f"{name} "))
                sizes[name] = size
                continue
            else:
                continue  # a few MB
        except StageError:
            sizes[name] = None
            continue
        sizes[name] = (sizes.get(name) or 0.0) + size
    root = Path(run().artifacts)
    while not root.exists():
        root = root.absolute().parent
    total = sum(gb for gb in sizes.values() if gb is not None)
    free = shutil.disk_usage(root).free / GB
    return {"gb": {**sizes, "total": total}, "free_gb": free, "train": how}


def too_long(name: str, lengths: dict[str, int]) -> list[str]:
    """A sentence where a set's longest prompt and an answer exceed the engine's context."""
    engine, longest = tasks.engine().settings, max(lengths.values())
    if longest + engine.max_new_tokens <= engine.max_model_len:
        return []
    return [
        f"{name}: a prompt of {longest:,} tokens and an answer of {engine.max_new_tokens:,} exceed "
        f"[engine] max_model_len = {engine.max_model_len:,}"
    ]


def model_of(base: Any) -> Path | str:
    """The base policy's folder if it exists, else what it is made of."""
    from training.model import tiny_policy

    with contextlib.suppress(OSError):
        if base.folder.is_dir():
            return Path(base.folder)
    return tiny_policy.source(base.settings.model)


def lines(summary: dict[str, Any]) -> list[str]:
    """The machine, the fits and the disk of a plan, as lines for a terminal."""
    machine = summary["machine"]
    title = (
        f"machine: {machine['gpus']} GPU{'s' * (machine['gpus'] > 1)} of {machine['gpu'] / GB:.0f} GB"
        if machine
        else "machine: not known; --gpus and --gpu-gb say it, or a recipe"
    )
    words = {True: "fits", False: "DOES NOT FIT", None: "needs"}
    rows = [title]
    rows += [f"  {one['stage']} {words[one['fits']]}: {one['reason']}" for one in summary["fits"]]
    on_disk = summary["disk"]
    sizes = {k: v for k, v in on_disk["gb"].items() if k != "total" and v != 0.0}
    parts = ", ".join(f"{k} {'unknown' if v is None else f'{v:.1f}'}" for k, v in sizes.items())
    rows.append(
        f"disk: {on_disk['gb']['total']:.1f} GB ({parts}), {on_disk['free_gb']:.1f} are free here"
    )
    if on_disk["train"]:
        rows.append(f"  a round of Train: {on_disk['train']}")
    return rows


def _quiet(_: str) -> None:
    return None
