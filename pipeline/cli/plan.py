"""Estimates a run before it starts: images, tokens, steps, hours, memory and disk.

    python -m pipeline plan --recipe training/recipes/paper_7b.cfg --dataset cub

The graph and the prompts are the real ones, but no weights are read and no stage runs. Where Split
has run, images are counted, and else estimated from the card. With a tokenizer on this machine,
prompts are counted in tokens, and else in characters. The output names its estimates.
With --scale it shows how the hours fall with more GPUs (`training/resources/scaling.py`), from the
rates that you measured on --gpus of them.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline import tasks
from pipeline.cli import fits, status
from pipeline.cli.run_sizes import (
    asked_about,
    averaged,
    base_of,
    image_lengths,
    images_of,
    pictures_gb,
    prompt_lengths,
    shards_of,
    token_counter,
)
from pipeline.settings import SettingsError, overlays, run
from tasks.evaluation import published
from training.resources import scaling


@dataclass
class Work:
    """The work of one stage: requests with an image, completions, tokens read and written, hours.

    It goes to the GPUs in `passes`, each of so many `units`: shards, or in training the completions of
    a step.
    """

    stage: str
    images: int
    completions: int
    tokens_in: int
    tokens_out: int
    steps: int = 0
    units: int = 1
    passes: int = 1
    hours: float | None = None
    done: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Estimates:
    """The options of the command line. Without rates there are no hours; 0 GPUs: the overlay's.

    Both rates are those of all `gpus` together. `scale` has the numbers of GPUs to compare,
    `engine_start` is in seconds, and `all_reduce_gb` in 10^9 bytes a second and GPU.
    """

    tokens_per_second: float = 0
    update_tokens_per_second: float = 0
    answer_tokens: int = 0
    chars_per_token: float = 4.0
    tokenizer: str = ""
    gpus: int = 0
    gpu_gb: float = 0
    images: int = 0
    image_kb: float = 0
    scale: Sequence[int] = ()
    engine_start: float = 0
    all_reduce_gb: float = 0
    download_rate: float = 0


def plan(dataset: str, method: str, seed: int, estimates: Estimates) -> dict[str, Any]:
    """The plan of TrainDiVE as plain values.

    Raises SettingsError when a set's size is not known before Split has run.
    """
    root = tasks.TrainDiVE(dataset=dataset, method=method, seed=seed)
    stages = status.graph(root)
    parts = {s.set_name: s.settings.part for s in stages if isinstance(s, tasks.Evaluate)}
    splits = [stage for stage in stages if isinstance(stage, tasks.Split)]
    counts = {
        stage.dataset: images_of(stage, parts[stage.dataset], estimates.images) for stage in splits
    }
    count, how = token_counter(stages, estimates.tokenizer, estimates.chars_per_token)
    lengths = {name: prompt_lengths(name, stages, count) for name in counts}
    pictures = {name: image_lengths(name, stages) for name in counts}
    average = {name: averaged(lengths[name], pictures[name]) for name in counts}
    answer = estimates.answer_tokens or max(1, tasks.engine().settings.max_new_tokens // 4)
    work = []
    for stage in stages:
        share = None
        if isinstance(stage, tasks.Propose):
            share = _propose(stage, counts, average, answer)
        elif isinstance(stage, tasks.Train):
            share = _train(stage, counts, average, answer)
        elif isinstance(stage, tasks.Evaluate):
            share = _evaluate(stage, counts, average, answer)
        if share:
            share.hours = _hours(share, estimates, isinstance(stage, tasks.Train))
            with contextlib.suppress(OSError):
                share.done = stage.folder.is_dir()
            work.append(share)
    train = next((s for s in stages if isinstance(s, tasks.Train)), None)
    longest = max(lengths.values(), key=lambda each: each["question"])
    prompt = longest["question"], longest["image"]
    machine = fits.machine_of(overlays(), estimates.gpus, estimates.gpu_gb)
    measured = replace(estimates, gpus=estimates.gpus or (machine.gpus if machine else 0))
    gb = pictures_gb(stages, counts, estimates.image_kb)
    limits = [t for name in counts for t in fits.too_long(name, lengths[name])]
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "rounds": run().rounds,
        "recipes": list(overlays()),
        "model": base_of(stages).settings.model,
        "images": counts,
        "prompt_tokens": lengths,
        "image_tokens": pictures,
        "tokens_counted_by": how,
        "answer_tokens": answer,
        "work": [asdict(one) for one in work],
        "hours": sum(one.hours or 0 for one in work) if estimates.tokens_per_second else None,
        "memory": fits.memory(train, prompt),
        "machine": asdict(machine) if machine else None,
        "fits": [asdict(one) for one in fits.fits(stages, train, prompt, machine)],
        "disk": fits.disk(stages, prompt, work, gb),
        "shards": shards_of(stages, counts),
        "scale": _scaled(work, counts, train, prompt, measured),
        "warnings": limits,
    }


def lines(summary: dict[str, Any]) -> list[str]:
    """The plan as lines for a terminal."""
    read = f"; over luigi.cfg: {', '.join(summary['recipes'])}" if summary["recipes"] else ""
    rows = [
        f"{summary['dataset']}: {summary['method']}, seed {summary['seed']}, {summary['rounds']} "
        f"rounds, from {summary['model']}{read}"
    ]
    for name, counts in summary["images"].items():
        asked = " and ".join(f"{n:,} {group}" for group, n in counts["evaluated"].items())
        rows.append(
            f"  {name}: {counts['train']:,} train images, {asked} images to evaluate, {counts['how']}"
        )
        lengths = summary["prompt_tokens"][name]
        rows.append(
            f"  prompts, tokens: {lengths['propose']:,} to propose, {lengths['evaluate']:,} to evaluate, "
            f"{lengths['question']:,} a question of training, {lengths['second']:,} of evaluation"
        )
        for stage, (most, mean) in summary["image_tokens"][name].items():
            known = f"{mean:,.0f} on average"
            average = (
                known if mean < most else "which stands for the average until Download has run"
            )
            rows.append(f"  of these the image in {stage}: at most {most:,}, {average}")
    rows += [
        f"  counted by {summary['tokens_counted_by']}",
        f"  answers of {summary['answer_tokens']:,} tokens are assumed, unless --answer-tokens says otherwise",
        "",
        f"{'stage':28}{'images':>9}{'completions':>13}{'tokens in':>16}{'tokens out':>16}{'hours':>9}",
    ]
    for one in summary["work"]:
        hours = "" if one["hours"] is None else f"{one['hours']:.2f}"
        done = "  done" if one["done"] else ""
        rows.append(
            f"{one['stage']:28}{one['images']:>9,}{one['completions']:>13,}{one['tokens_in']:>16,}"
            f"{one['tokens_out']:>16,}{hours:>9}{done}"
        )
        rows += [f"  {line}" for line in one["notes"]]
    if summary["hours"] is None:
        rows.append("for hours give --tokens-per-second, what the engine writes in all")
    else:
        rows += [
            f"{summary['hours']:.1f} hours in all, without loading, Download and Split",
            "in them engines read prompts only as far as --tokens-per-second was measured with prompts",
        ]
    numbers = ", ".join(f"{name} {count:,}" for name, count in summary["shards"].items())
    rows.append(f"shards, each a file of Parquet: {numbers}")
    rows += fits.lines(summary)
    if summary["scale"]:
        rows += scaling.lines(summary["scale"])
    return [*rows, *(f"warning: {line}" for line in summary["warnings"])]


def _propose(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    images, settings = counts[stage.set_name]["train"], stage.settings
    images = min(images, settings.limit) if settings.limit else images
    completions = images * settings.num_rollouts
    read = images * lengths[stage.set_name]["propose"]
    work = Work(_name(stage), images, completions, read, completions * answer)
    work.units = max(1, -(-images // settings.shard_size))
    return work


def _train(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    pool = sum(asked_about(built, counts[built.set_name]) for built in stage.questions())
    pool = min(pool, stage.settings.max_questions or pool)
    settings = stage.settings.with_steps(pool)
    steps, each = settings.steps, settings.questions_per_step
    questions = steps * each
    completions = questions * settings.num_generations
    longest = max(lengths[name]["question"] for name in stage.names)
    answer = min(answer, settings.max_completion_length)
    read = (questions if fits.shares(stage) else completions) * longest
    work = Work(_name(stage), questions, completions, read, completions * answer)
    work.steps = work.passes = steps
    work.units = each * settings.num_generations
    note = f"{steps:,} steps of {each} questions: {questions / pool:.2f} epochs"
    note += f" of {pool:,} images, more of the questions that are kept"
    if (epochs := published.EPOCHS.get(stage.dataset)) is not None:
        shots = tasks.Split(dataset=stage.dataset, seed=stage.seed).settings.shots
        budget = f"{epochs} epochs of the questions kept, about {published.STEPS} steps"
        note += f"; published: {f'about {published.FEW_SHOT_STEPS} steps' if shots else budget}"
    work.notes.append(note)
    return work


def _evaluate(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    settings, own, of_set = stage.settings, counts[stage.set_name], lengths[stage.set_name]
    images = sum(min(count, settings.limit or count) for count in own["evaluated"].values())
    modes = settings.mode_names
    one_step, samples = "one_step" in modes, settings.num_rollouts * (modes != ["one_step"])
    questions = images * sum(mode not in ("one_step", "majority") for mode in modes)
    opened, sampled = images * (one_step + bool(samples)), images
    notes = []
    if "adaptive" in modes:
        val = min(own["val"], settings.limit or own["val"])
        opened, sampled = opened + val, sampled + val
        questions += val * len(settings.counts) * len({2, settings.num_options})
        notes = [
            f"at most: adaptive with all samples, and the {val:,} val images of its thresholds"
        ]
    completions = images * one_step + sampled * samples + questions
    read = opened * of_set["evaluate"] + questions * of_set["second"]
    work = Work(_name(stage), opened + questions, completions, read, completions * answer)
    work.units, work.passes = max(1, -(-images // settings.shard_size)), len(modes)
    work.notes += notes
    return work


def _scaled(
    work: Sequence[Work], counts: dict, train: Any, prompt: tuple, estimates: Estimates
) -> list[dict[str, Any]]:
    """The hours on each number of GPUs in `estimates.scale`, all stages counted as not done."""
    if not estimates.scale:
        return []
    if not (estimates.tokens_per_second and estimates.gpus):
        raise SettingsError(
            "--scale needs a rate and the GPUs that it was measured on: --tokens-per-second and --gpus"
        )
    rates = scaling.Rates(
        estimates.tokens_per_second / estimates.gpus,
        estimates.update_tokens_per_second / estimates.gpus,
        estimates.engine_start,
        estimates.all_reduce_gb * fits.GB,
        tasks.engine().settings.tensor_parallel_size,
    )
    rate = estimates.download_rate or scaling.DOWNLOADED
    shares = [
        scaling.Share(f"Download {name}", alone=each["all"] / rate) for name, each in counts.items()
    ]
    for one in work:
        share = scaling.Share(one.stage, one.tokens_out, units=one.units, passes=one.passes)
        if one.steps:
            sent = fits.asked_of(train, prompt).trained * 4.0 if rates.reduced else 0.0  # float32
            both = float(one.tokens_in + one.tokens_out)
            share = replace(share, updated=both, gradients=sent, trains=True)
        shares.append(share)
        if one.stage.startswith("Propose"):
            name = one.stage.replace("Propose", "BuildMCQ")
            shares.append(scaling.Share(name, alone=one.completions / scaling.BUILT))
    return scaling.table(shares, estimates.scale, rates)


def _hours(work: Work, estimates: Estimates, trains: bool) -> float | None:
    if not estimates.tokens_per_second:
        return None
    seconds = work.tokens_out / estimates.tokens_per_second
    if trains and estimates.update_tokens_per_second:
        seconds += (work.tokens_in + work.tokens_out) / estimates.update_tokens_per_second
    elif trains:
        work.notes.append("generation alone; --update-tokens-per-second adds the gradient steps")
    return seconds / 3600


def _name(stage: Any) -> str:
    name = getattr(stage, "set_name", stage.dataset)
    place = f" {name}" if name != stage.dataset else ""
    return f"{stage.task_family} {stage.method} {stage.refresh_round}{place}"
