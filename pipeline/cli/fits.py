"""Whether the stages of a run fit into a machine: GPUs, main memory, and disk, before anything runs.

The machine is that of the command line, or the one that a recipe names in a comment of this form:

    # machine: 8 x 80 GB, 500 GB main memory

so many GPUs with so much memory each, in 10^9 bytes; the main memory is of each machine, and may be
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
TOKEN = 4  # bytes of text a token, before compression
NAMED = re.compile(r"^# machine: (\d+) x (\d+) GB(?:, (\d+) GB main memory)?$", re.MULTILINE)
SHARE = "[engine] gpu_memory_utilization"


@dataclass(frozen=True)
class Machine:
    """So many GPUs, all that a run uses, of so many bytes each; `main` memory, 0 where unknown."""

    gpus: int
    gpu: float
    main: float = 0.0


@dataclass(frozen=True)
class Fit:
    """A stage on the machine: whether it fits, None where that is not known, and why, in a sentence."""

    stage: str
    fits: bool | None
    told: str


def machine_of(files: Sequence[str], gpus: int = 0, gpu_gb: float = 0) -> Machine | None:
    """The machine that the last of some recipes names, what the command line gives in its place."""
    found = [m for f in files for m in NAMED.findall(Path(f).read_text(encoding="utf-8"))]
    count, size, main = found[-1] if found else (0, 0, 0)
    gpus, gpu_gb = gpus or int(count), gpu_gb or float(size)
    if gpu_gb and not gpus:
        gpus = 1
    return Machine(gpus, gpu_gb * GB, float(main or 0) * GB) if gpu_gb else None


def asked_of(train: Any, prompt: tuple[int, int]) -> Any:
    """`training.resources.needs.Asked` for a stage Train and a prompt of so many tokens, and so many of the image.

    Raises StageError where its launcher's file cannot be read.
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


def memory(train: Any | None, prompt: tuple[int, int]) -> dict[str, Any]:
    """What a process of Train must hold, in GiB by part; how, where that is not known."""
    from tasks.runtime.errors import StageError
    from training.resources import gpu_memory

    if train is None:
        return {}
    try:
        needed = gpu_memory.of_gpu(asked_of(train, prompt))
    except StageError as error:
        return {"how": f"unknown: {error}"}
    told = {name: amount / GIB for name, amount in asdict(needed).items()}
    how = "from the model's config, for one process"
    return {"gib": {**told, "total": needed.total / GIB}, "how": how}


def fits(
    stages: Sequence[Stage], train: Any | None, prompt: tuple[int, int], machine: Machine | None
) -> list[Fit]:
    """Propose, Train and Evaluate on the machine; of an unknown one only what they need is told."""
    from tasks.runtime.errors import StageError
    from training.resources.sizes import sizes_of

    found, unknown = [], ""
    try:
        sizes_of(model_of(next(s for s in stages if isinstance(s, tasks.BasePolicy))))
    except StageError as error:
        unknown = str(error)
    for kind in (tasks.Propose, tasks.Train, tasks.Evaluate):
        if not any(isinstance(stage, kind) for stage in stages):
            continue
        name = kind.__name__
        if unknown:
            found.append(Fit(name, None, unknown))
            continue
        try:
            told = (
                _train(asked_of(train, prompt), machine)
                if kind is tasks.Train
                else _engine(stages, machine)
            )
            found.append(Fit(name, None if machine is None else True, told))
        except Unknown as why:
            found.append(Fit(name, None, str(why)))
        except StageError as error:
            found.append(Fit(name, False if machine else None, str(error)))
    return found


class Unknown(Exception):
    """Nothing can be said, and why."""


def _engine(stages: Sequence[Stage], machine: Machine | None) -> str:
    """Propose's and Evaluate's engine; raises StageError where it does not fit."""
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
    """Train's processes with their vLLM; raises StageError where they do not fit."""
    from tasks.runtime.errors import StageError
    from training.resources import gpu_memory, main_memory, needs, vllm_memory

    needed, engine, main = (
        gpu_memory.of_gpu(asked),
        needs.of_vllm(asked),
        main_memory.of_main_memory(asked),
    )
    told = [
        f"{needed.described()} a process",
        *([engine.described()] if engine else []),
        main.described(),
    ]
    if machine is None:
        return "; ".join(told)
    if asked.place.processes > machine.gpus:
        raise StageError(
            f"[Train] launcher starts {asked.place.processes} processes and there are "
            f"{machine.gpus} GPUs"
        )
    share = 0.0
    if engine:
        given = asked.options.vllm_gpu_memory_utilization
        share = vllm_memory.check_vllm(engine, given, machine.gpu, say=_quiet)
    sleeps = asked.options.vllm_enable_sleep_mode
    gpu_memory.check(needed, machine.gpu, share, sleeps, say=_quiet)
    room = machine.gpu - (0.0 if sleeps else share)
    if needed.total > room:
        raise StageError(
            f"training takes about {needed.described()} a process and there are {room / GIB:.2f} GiB"
        )
    if machine.main:
        main_memory.check_main(main, machine.main, say=_quiet)
    return "; ".join([*told, f"{room / GIB:.2f} GiB are there for a process"])


def disk(stages: Sequence[Stage], prompt: tuple[int, int], work: Sequence[Any]) -> dict[str, Any]:
    """GB that the stages of a run write, by stage, 0 where done; None where that is not known.

    `work` are the plan's. Of rounds before the last what remains, of the last one the most.
    """
    from tasks.runtime.errors import StageError
    from training.resources.disk import of_disk
    from training.resources.sizes import sizes_of

    found: dict[str, float | None] = {}
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
            elif isinstance(stage, tasks.Download):
                found[name] = None
                continue
            elif isinstance(stage, tasks.Propose | tasks.Evaluate):
                size = sum(gb for of, gb in texts.items() if of.startswith(f"{name} "))
                found[name] = size
                continue
            else:
                continue  # texts and numbers of a few MB
        except StageError:
            found[name] = None
            continue
        found[name] = (found.get(name) or 0.0) + size
    root = Path(run().artifacts)
    while not root.exists():
        root = root.absolute().parent
    total = sum(gb for gb in found.values() if gb is not None)
    free = shutil.disk_usage(root).free / GB
    return {"gb": {**found, "total": total}, "free_gb": free, "train": how}


def model_of(base: Any) -> Path | str:
    """The base policy's folder where it is made, else what it is made of; `tiny` is a few MB."""
    with contextlib.suppress(OSError):
        if base.folder.is_dir():
            return Path(base.folder)
    return str(base.settings.model)


def lines(found: dict[str, Any]) -> list[str]:
    """What fits, and the disk, for a terminal."""
    machine = found["machine"]
    told = (
        f"machine: {machine['gpus']} GPU{'s' * (machine['gpus'] > 1)} of {machine['gpu'] / GB:.0f} GB"
        if machine
        else "machine: not known; --gpus and --gpu-gb say it, or a recipe"
    )
    words = {True: "fits", False: "DOES NOT FIT", None: "needs"}
    rows = [told]
    rows += [f"  {one['stage']} {words[one['fits']]}: {one['told']}" for one in found["fits"]]
    sizes = {k: v for k, v in found["disk"]["gb"].items() if k != "total" and v != 0.0}
    parts = ", ".join(f"{k} {'unknown' if v is None else f'{v:.1f}'}" for k, v in sizes.items())
    rows.append(
        f"disk: {found['disk']['gb']['total']:.1f} GB ({parts}), {found['disk']['free_gb']:.1f} are "
        "free here"
    )
    if found["disk"]["train"]:
        rows.append(f"  a round of Train: {found['disk']['train']}")
    return rows


def _quiet(_: str) -> None:
    return None
