"""What a run will ask of a machine, before it starts: images, tokens, steps, hours, memory.

    python -m pipeline plan --recipe training/recipes/paper_7b.cfg --dataset cub

The graph and the prompts are the real ones; no weights are read and nothing is run. Where Split
has run, images are counted; else they follow from the card. Where a tokenizer lies on this machine
prompts are counted in its tokens, else by characters. What is an estimate says so.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import data_cards
from pipeline import tasks
from pipeline.cli import fits, status
from pipeline.cli.image_counts import images_of
from pipeline.settings import SettingsError, recipes, run
from pipeline.stage import Stage
from tasks.language import prompts
from tasks.tables.schemas import GROUPS
from tasks.tables.split_table import base_count

PATCH = 28  # pixels: the side of a merged vision token of the Qwen2-VL family; others differ
# Epochs of the published runs (arXiv 2511.18305, its training scripts).
PUBLISHED_EPOCHS = {"cub": 1.5, "flowers": 3.2, "pets": 4.1, "cars": 1.1, "aircraft": 1.9}


@dataclass
class Work:
    """One stage's share: requests with an image, completions, tokens read and written, hours."""

    stage: str
    images: int
    completions: int
    tokens_in: int
    tokens_out: int
    steps: int = 0
    hours: float | None = None
    done: bool = False
    told: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """What the command line says; 0 leaves hours out, and the machine to the recipe."""

    tokens_per_second: float = 0
    update_tokens_per_second: float = 0
    answer_tokens: int = 0
    chars_per_token: float = 4.0
    tokenizer: str = ""
    gpus: int = 0
    gpu_gb: float = 0


def plan(dataset: str, method: str, seed: int, given: Given) -> dict[str, Any]:
    """The plan of TrainDiVE as plain values.

    Raises SettingsError where a set's size is not known: Split has to run first.
    """
    root = tasks.TrainDiVE(dataset=dataset, method=method, seed=seed)
    stages = status.graph(root)
    counts = {s.dataset: images_of(s) for s in stages if isinstance(s, tasks.Split)}
    count, how = token_counter(stages, given)
    lengths = {name: prompt_lengths(name, stages, count) for name in counts}
    answer = given.answer_tokens or max(1, tasks.engine().settings.max_new_tokens // 4)
    work = []
    for stage in stages:
        made = None
        if isinstance(stage, tasks.Propose):
            made = _propose(stage, counts, lengths, answer)
        elif isinstance(stage, tasks.Train):
            made = _train(stage, counts, lengths, answer)
        elif isinstance(stage, tasks.Evaluate):
            made = _evaluate(stage, counts, lengths, answer)
        if made:
            made.hours = _hours(made, given, isinstance(stage, tasks.Train))
            with contextlib.suppress(OSError):
                made.done = stage.folder.is_dir()
            work.append(made)
    train = next((s for s in stages if isinstance(s, tasks.Train)), None)
    longest = max(lengths.values(), key=lambda each: each["question"])
    prompt = longest["question"], longest["image"]
    machine = fits.machine_of(recipes(), given.gpus, given.gpu_gb)
    limits = [t for name in counts for t in _too_long(name, lengths[name])]
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "rounds": run().rounds,
        "recipes": list(recipes()),
        "model": _base(stages).settings.model,
        "images": counts,
        "prompt_tokens": lengths,
        "tokens_counted_by": how,
        "answer_tokens": answer,
        "work": [asdict(one) for one in work],
        "hours": sum(one.hours or 0 for one in work) if given.tokens_per_second else None,
        "memory": fits.memory(train, prompt),
        "machine": asdict(machine) if machine else None,
        "fits": [asdict(one) for one in fits.fits(stages, train, prompt, machine)],
        "disk": fits.disk(stages, prompt, work),
        "warnings": limits,
    }


def token_counter(stages: Sequence[Stage], given: Given) -> tuple[Callable[[str], int], str]:
    """How texts are counted: by a tokenizer that lies here, else by characters."""
    base = _base(stages)
    place = given.tokenizer
    if not place:
        with contextlib.suppress(OSError):
            place = str(base.folder) if base.folder.is_dir() else place
        model = base.settings.model
        if not place and (Path(model).expanduser().is_dir() or _cached(model)):
            place = model
    if not place:
        return (
            lambda text: round(len(text) / given.chars_per_token),
            f"characters, {given.chars_per_token:g} a token (no tokenizer here; give --tokenizer)",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SettingsError(f"no tokenizer in {place}: {str(error).splitlines()[0]}") from error
    return lambda text: len(tokenizer(text)["input_ids"]), f"the tokenizer in {place}"


def prompt_lengths(
    name: str, stages: Sequence[Stage], count: Callable[[str], int]
) -> dict[str, int]:
    """Tokens of a set's prompts, image included: open (or closed list) by use, and the question."""
    card = data_cards.load(name)
    base = _base(stages)
    image = max(1, round(base.settings.max_pixels / PATCH**2))
    number = base_count(len(card.classes), tasks.Split(dataset=name, seed=0).protocol)
    groups = {"base": list(card.classes[:number]), "novel": list(card.classes[number:])}
    engine = tasks.engine().settings
    propose = next((s for s in stages if isinstance(s, tasks.Propose)), None)
    evaluate = next(s for s in stages if isinstance(s, tasks.Evaluate))

    def asked(prompt: str, names: list[str]) -> int:
        style, position = engine.prompt_style, engine.list_position
        texts = prompts.card_question(card, prompt, names, style=style, list_position=position)
        return count("\n".join(texts)) + image

    return {
        "image": image,
        "propose": asked(propose.settings.prompt, groups["base"]) if propose else 0,
        "evaluate": max(asked(evaluate.settings.prompt, groups[g]) for g in GROUPS if groups[g]),
        "question": count(longest_question(name, stages)) + image,
    }


def longest_question(name: str, stages: Sequence[Stage]) -> str:
    """The multiple-choice question of a set whose options have the longest names."""
    card = data_cards.load(name)
    propose = next((s for s in stages if isinstance(s, tasks.Propose)), None)
    evaluate = next(s for s in stages if isinstance(s, tasks.Evaluate))
    options = propose and tasks.BuildMCQ(**_of(propose)).settings.num_options
    longest = sorted(card.classes, key=len)[-(options or evaluate.settings.num_options) :]
    style = tasks.engine().settings.prompt_style
    return prompts.mcq_question(card.noun, card.kind, longest, style=style)


def lines(found: dict[str, Any]) -> list[str]:
    """The plan for a terminal."""
    read = f"; over luigi.cfg: {', '.join(found['recipes'])}" if found["recipes"] else ""
    told = [
        f"{found['dataset']}: {found['method']}, seed {found['seed']}, {found['rounds']} rounds, "
        f"from {found['model']}{read}"
    ]
    for name, counts in found["images"].items():
        test = " and ".join(f"{n:,} {group}" for group, n in counts["test"].items())
        told.append(
            f"  {name}: {counts['train']:,} train images, {test} test images, {counts['how']}"
        )
        lengths = found["prompt_tokens"][name]
        told.append(
            f"  prompts, tokens: {lengths['propose']:,} to propose, {lengths['evaluate']:,} to evaluate, "
            f"{lengths['question']:,} a question, {lengths['image']:,} of each the image"
        )
    told += [
        f"  counted by {found['tokens_counted_by']}",
        f"  answers of {found['answer_tokens']:,} tokens are assumed, unless --answer-tokens says otherwise",
        "",
        f"{'stage':28}{'images':>9}{'completions':>13}{'tokens in':>13}{'tokens out':>13}{'hours':>8}",
    ]
    for one in found["work"]:
        hours = "" if one["hours"] is None else f"{one['hours']:.2f}"
        done = "  done" if one["done"] else ""
        told.append(
            f"{one['stage']:28}{one['images']:>9,}{one['completions']:>13,}{one['tokens_in']:>13,}"
            f"{one['tokens_out']:>13,}{hours:>8}{done}"
        )
        told += [f"  {line}" for line in one["told"]]
    if found["hours"] is None:
        told.append("for hours give --tokens-per-second, what the engine writes in all")
    else:
        told.append(f"{found['hours']:.1f} hours in all, without loading, Download and Split")
    told += fits.lines(found)
    return [*told, *(f"warning: {line}" for line in found["warnings"])]


def _propose(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    images = counts[stage.set_name]["train"]
    given = stage.settings
    images = min(images, given.limit) if given.limit else images
    completions = images * given.num_rollouts
    read = images * lengths[stage.set_name]["propose"]
    return Work(_name(stage), images, completions, read, completions * answer)


def _train(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    settings = stage.settings
    steps, each = settings.steps, settings.questions_per_step
    questions = steps * each
    completions = questions * settings.num_generations
    longest = max(lengths[name]["question"] for name in stage.names)
    answer = min(answer, settings.max_completion_length)
    made = Work(_name(stage), questions, completions, completions * longest, completions * answer)
    made.steps = steps
    pool = sum(counts[name]["train"] for name in stage.names)
    told = f"{steps:,} steps of {each} questions: {questions / pool:.2f} epochs"
    told += f" of {pool:,} images, more of the questions that are kept"
    if (published := PUBLISHED_EPOCHS.get(stage.dataset)) is not None:
        whole = round(published * pool / each)
        told += f"; published: {published} epochs, here {whole:,} steps in all rounds"
    made.told.append(told)
    return made


def _evaluate(stage: Any, counts: dict, lengths: dict, answer: int) -> Work:
    images = sum(counts[stage.set_name]["test"].values())
    given = stage.settings
    modes = given.chosen_modes
    questions = sum(mode in ("two_step", "mcq", "constrained") for mode in modes)
    opened = 1 + ("one_step" in modes)
    of_set = lengths[stage.set_name]
    completions = images * (given.num_rollouts + ("one_step" in modes) + questions)
    read = images * (opened * of_set["evaluate"] + questions * of_set["question"])
    return Work(
        _name(stage), images * (opened + questions), completions, read, completions * answer
    )


def _hours(made: Work, given: Given, trains: bool) -> float | None:
    if not given.tokens_per_second:
        return None
    seconds = made.tokens_out / given.tokens_per_second
    if trains and given.update_tokens_per_second:
        seconds += (made.tokens_in + made.tokens_out) / given.update_tokens_per_second
    elif trains:
        made.told.append("generation alone; --update-tokens-per-second adds the gradient steps")
    return seconds / 3600


def _too_long(name: str, lengths: dict[str, int]) -> list[str]:
    engine = tasks.engine().settings
    longest = max(lengths.values())
    if longest + engine.max_new_tokens <= engine.max_model_len:
        return []
    return [
        f"{name}: a prompt of {longest:,} tokens and an answer of {engine.max_new_tokens:,} exceed "
        f"[engine] max_model_len = {engine.max_model_len:,}"
    ]


def _base(stages: Sequence[Stage]) -> Any:
    return next(s for s in stages if isinstance(s, tasks.BasePolicy))


def _of(stage: Any) -> dict[str, Any]:
    return {"subset": stage.subset, **tasks.graph(stage)}


def _name(stage: Any) -> str:
    place = f" {stage.set_name}" if getattr(stage, "subset", "") else ""
    return f"{stage.task_family} {stage.method} {stage.refresh_round}{place}"


def _cached(model: str, file: str = "tokenizer.json") -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, file), str)
    except HFValidationError:
        return False
