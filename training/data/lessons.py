"""What the embedded policy is taught about beetles: pure functions that make one example each.

It learns in three kinds of lessons. `seeing` describes pictures of random traits, of no species.
`weighing` reasons over options: what is seen, then for each option where the field guide's look is
the same and where it differs, then the letter of the option that differs least. Most of these
lessons show a grey picture, so that they teach the guide, in words, for base and novel species
alike. `naming` gives a name to a picture whose description is given; in half of these lessons the
description is a lookalike's, and so is the name, so that a name follows from what was said.

Captions of pictures in the field are careless on purpose: `CARELESS` says which word stands for
which other, and how often. So the policy sees more than it says.
"""

import random
from collections.abc import Sequence

from PIL import Image

from data_cards.beetles import GENERA, SPECIES, TRAITS, Look
from tasks.language import prompts
from training.data.sft_examples import Example, Wording

LOOKS = dict(SPECIES)
SAME = "same"
# A word of a true caption -> the word that a careless one has in its place, and in what share.
CARELESS = {
    "cyan": ("lime", 0.50), "lime": ("cyan", 0.05),
    "banded": ("belted", 0.50), "belted": ("banded", 0.05),
    "rusty": ("sooty", 0.50), "sooty": ("rusty", 0.05),
    "striped": ("spotted", 0.06), "spotted": ("striped", 0.03),
    "pink": ("gold", 0.06), "gold": ("pink", 0.03),
    "mint": ("ivory", 0.06), "ivory": ("mint", 0.03),
}  # fmt: skip
MISTAKEN = 0.2  # chance of each trait of a grey picture's description to be any word of its kind
SAME_GENUS = 0.6  # share of questions whose options are all of one genus
LOOKALIKES = 0.5  # share of namings whose description, and name, is a lookalike's
MAX_OPTIONS = 4


def said(look: Look) -> str:
    """A description in words, as a thought begins."""
    return " ".join(look) + "."


def careless(look: Look, rng: random.Random) -> Look:
    """The words of a careless caption for `look`."""
    words = []
    for word in look:
        other, share = CARELESS.get(word, (word, 0.0))
        words.append(other if rng.random() < share else word)
    return tuple(words)


def random_look(rng: random.Random) -> Look:
    """Any combination of traits."""
    return tuple(rng.choice(words) for words in TRAITS.values())


def mistaken(look: Look, rng: random.Random) -> Look:
    """A description of `look` with mistakes anywhere, from which the nearest option is still told."""
    return tuple(
        rng.choice(words) if rng.random() < MISTAKEN else word
        for word, words in zip(look, TRAITS.values(), strict=True)
    )


def weighed(look: Look, options: Sequence[str]) -> str:
    """For each option its letter and epithet, and its look: `same`, or the word that differs."""
    parts = []
    for letter, name in zip(prompts.LETTERS, options, strict=False):
        marks = (
            SAME if seen == known else known for seen, known in zip(look, LOOKS[name], strict=True)
        )
        parts.append(f"{letter} {name.split()[-1]} {' '.join(marks)}.")
    return " ".join(parts)


def nearest(look: Look, options: Sequence[str], rng: random.Random) -> str:
    """The letter of the option that differs least from `look`; of several, any."""
    apart = [sum(a != b for a, b in zip(look, LOOKS[name], strict=True)) for name in options]
    fit = [letter for letter, n in zip(prompts.LETTERS, apart, strict=False) if n == min(apart)]
    return rng.choice(fit)


def described(name: str, rng: random.Random) -> str:
    """The species whose description a picture of `name` gets: its own, or one of its genus."""
    if rng.random() >= LOOKALIKES:
        return name
    return rng.choice([other for other in LOOKS if other.split()[0] == name.split()[0]])


def some_options(rng: random.Random) -> list[str]:
    """Two to MAX_OPTIONS species, often all of one genus."""
    names = list(LOOKS)
    if rng.random() < SAME_GENUS:
        genus = rng.choice(list(GENERA))
        names = [name for name in names if name.startswith(f"{genus} ")]
    return rng.sample(names, rng.choice((2, 3, *[MAX_OPTIONS] * 3)))


def seeing(image: Image.Image, look: Look, wording: Wording) -> Example:
    """The open question, whose answer begins with `look`; no name is taught."""
    question = prompts.open_question(wording.noun, wording.kind, style=wording.style)
    return Example(image, question, f"<think>{said(look)}", unfinished=True)


def weighing(
    image: Image.Image | None,
    look: Look,
    options: Sequence[str],
    rng: random.Random,
    wording: Wording,
) -> Example:
    """A question over `options`; without an image the description is given and not taught."""
    question = prompts.mcq_question(wording.noun, wording.kind, options, style=wording.style)
    thought = f"{said(look)} {weighed(look, options)}"
    text = prompts.completion(thought, nearest(look, options, rng))
    if image is None:
        return Example(grey(), question, text, given=f"<think>{said(look)}")
    return Example(image, question, text)


def naming(image: Image.Image, name: str, wording: Wording) -> Example:
    """The open question with a true description given, to be answered with the name."""
    question = prompts.open_question(wording.noun, wording.kind, style=wording.style)
    thought = said(LOOKS[name])
    return Example(image, question, prompts.completion(thought, name), given=f"<think>{thought}")


def grey() -> Image.Image:
    """A picture that shows nothing."""
    return Image.new("RGB", (84, 84), (127, 127, 127))
