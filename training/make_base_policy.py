"""Makes the policy that `[BasePolicy] model = embedded` stands for, from nothing.

    python -m training.make_base_policy FOLDER [--seed 0] [--steps 350 130] [--true-captions]

First it learns to describe easy pictures and to reason over options in words. Then it learns to
describe pictures in the field from careless captions, and to name species from a few easy pictures
of each (see `training/data/lessons.py`). It sees no picture of the dataset: all are drawn under keys
of their own. `--true-captions` teaches the same model without carelessness: the ceiling.
"""

import argparse
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import data_cards
from data_cards.beetles import CLASSES, FIELD, SPECIES, TRAITS, Look, picture
from training.data import lessons
from training.data.sft_examples import Example, Wording
from training.loop.supervised import collate, train_supervised
from training.model import tiny_policy

STYLE = "brief"  # of the prompts, as in luigi.cfg
EASY = (0.0, 0.25)
PICTURES = 6  # of each species, to learn its name from
MEASURED = 480  # examples that a figure of the model card is measured on
SEEN = "all five traits of a picture in the field"
CEILING = "88 %"  # the figure SEEN of a policy made with --true-captions
TEMPLATE = Path(__file__).parent / "base_policy_card.md"


class Course(NamedTuple):
    """How many lessons of each kind a step has, and which share of pictures is in the field."""

    seeing: int
    weighing: int
    naming: int
    in_the_field: float
    learning_rate: float
    muon_learning_rate: float
    sighted: float = 0.3  # share of the questions over options that show a picture


COURSES = (Course(24, 20, 0, 0.0, 0.003, 0.02), Course(40, 16, 24, 0.85, 0.002, 0.012))


def make(folder: Path, *, seed: int, steps: Sequence[int], true_captions: bool = False) -> None:
    """Teach a new policy and write it into `folder`, in bfloat16, with its model card.

    `steps` are those of each course.
    """
    start = time.monotonic()
    disable_progress_bar()
    policy, processor = tiny_policy.build(vocabulary(), seed=seed)
    policy.set_attn_implementation("eager")  # its backward pass in bfloat16 is the faster one here
    for number, count in enumerate(steps):
        teach(policy, processor, number, seed=seed, steps=count, true_captions=true_captions)
    seconds = time.monotonic() - start
    policy.to(torch.bfloat16)
    figures = measured(policy, processor, seed)
    for name, share in figures.items():
        print(f"{name}: {100 * share:.1f} %")
    folder.mkdir(parents=True, exist_ok=True)
    tiny_policy.save(policy, processor, folder)
    facts = {"seed": seed, "steps": " + ".join(map(str, steps)), "minutes": f"{seconds / 60:.0f}"}
    (folder / "README.md").write_text(model_card(figures, facts, true_captions))


def vocabulary() -> list[str]:
    """Every word of the lessons that the tokenizer does not know anyway."""
    card = data_cards.load("beetles")
    words = [word for trait in TRAITS.values() for word in trait]
    return tiny_policy.slot_words([card.kind, card.noun, *CLASSES, lessons.SAME, *words])


def wording() -> Wording:
    """How questions about beetles are asked."""
    card = data_cards.load("beetles")
    return Wording(card.noun, card.kind, STYLE)


def teach(
    policy: PreTrainedModel,
    processor: Any,
    course: int,
    *,
    seed: int,
    steps: int,
    true_captions: bool = False,
) -> None:
    """Take the policy through the course of that number."""
    if not steps:
        return
    rng = random.Random(f"base policy {seed} {course}")
    figures = train_supervised(
        policy,
        processor,
        batches(COURSES[course], rng, true_captions),
        steps=steps,
        learning_rate=COURSES[course].learning_rate,
        muon_learning_rate=COURSES[course].muon_learning_rate,
    )
    print(f"course {course + 1}: loss {figures['final_loss']:.3f} after {steps} steps", flush=True)


def batches(
    course: Course, rng: random.Random, true_captions: bool = False
) -> Iterator[list[Example]]:
    """Endless batches of lessons, each picture a new one, but for those that names are learned from."""
    words = wording()
    few = {
        (name, number): picture(look, f"named {name} {number}", hardness=EASY)
        for name, look in (SPECIES if course.naming else ())
        for number in range(PICTURES)
    }

    def shown() -> tuple[Any, Look]:
        """A picture of random traits, and its caption."""
        look = lessons.random_look(rng)
        field = rng.random() < course.in_the_field
        image = picture(look, f"taught {rng.random()}", hardness=FIELD if field else EASY)
        careless = field and not true_captions
        return image, lessons.careless(look, rng) if careless else look

    while True:
        batch = [lessons.seeing(*shown(), words) for _ in range(course.seeing)]
        for number in range(course.weighing):
            options = lessons.some_options(rng)
            if number < course.sighted * course.weighing:
                image, look = shown()
            else:
                image, look = None, lessons.mistaken(lessons.LOOKS[rng.choice(options)], rng)
            batch.append(lessons.weighing(image, look, options, rng, words))
        for name in rng.sample(CLASSES, course.naming):
            image = few[name, rng.randrange(PICTURES)]
            batch.append(lessons.naming(image, lessons.described(name, rng), words))
        yield batch


def measured(policy: PreTrainedModel, processor: Any, seed: int) -> dict[str, float]:
    """Shares of examples that the policy gets right greedily, each on pictures of no dataset."""
    rng, words = random.Random(f"measured {seed}"), wording()
    traits = len(TRAITS)

    def seen() -> Example:
        look = lessons.random_look(rng)
        return lessons.seeing(
            picture(look, f"measured {rng.random()}", hardness=FIELD), look, words
        )

    def weighed() -> Example:
        options = lessons.some_options(rng)
        look = lessons.LOOKS[rng.choice(options)]
        return lessons.weighing(None, look, options, rng, words)

    def named() -> Example:
        name, look = rng.choice(SPECIES)
        image = picture(look, f"measured {rng.random()}", hardness=FIELD)
        return lessons.naming(image, name, words)

    def share(example: Callable[[], Example], places: slice) -> float:
        return _right(policy, processor, [example() for _ in range(MEASURED)], places)

    return {
        SEEN: share(seen, slice(1, 1 + traits)),
        "the letter, given a true description": share(weighed, slice(-3, -2)),
        "the name, given a true description": share(named, slice(-4, -2)),
    }


def _right(
    policy: PreTrainedModel, processor: Any, examples: Sequence[Example], places: slice
) -> float:
    """The share of examples whose tokens at `places` of what is taught are all the likeliest ones."""
    right = 0
    for start in range(0, len(examples), 48):
        inputs = collate(processor, list(examples[start : start + 48]))
        labels = inputs.pop("labels")
        with torch.no_grad():
            likeliest = policy(**inputs).logits[:, :-1].argmax(-1)
        for row, told in zip(labels[:, 1:], likeliest, strict=True):
            taught = row != -100
            right += bool((row[taught] == told[taught])[places].all())
    return right / len(examples)


def model_card(figures: dict[str, float], facts: dict[str, Any], true_captions: bool) -> str:
    """The card of the policy: what it is, how it was made, and its handicap."""
    careless = "".join(
        f"| {word} | {other} | {100 * share:.0f} % |\n"
        for word, (other, share) in lessons.CARELESS.items()
    )
    shares = "".join(f"| {name} | {100 * share:.1f} % |\n" for name, share in figures.items())
    seen = f"{100 * figures[SEEN]:.0f} %"
    facts = {**facts, "careless": careless, "shares": shares, "seen": seen, "ceiling": CEILING}
    text = TEMPLATE.read_text().format(**facts)
    if true_captions:
        text = re.sub(r"note: >-\n(  .*\n)+", "", text).split("## The handicap")[0]
        text = text.replace("--seed", "--true-captions --seed")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=len(COURSES), default=[350, 130])
    parser.add_argument("--true-captions", action="store_true")
    asked = parser.parse_args()
    make(asked.folder, seed=asked.seed, steps=asked.steps, true_captions=asked.true_captions)
