"""Text-only pretraining of the tiny policy: from a name in the thought to the letter of its option.

Finding the option whose name was just said and copying its letter takes three attention steps in
a row (a name's token fetches its letter; the same name said again finds that token; the answer
fetches what was found). Asked for all at once, so small a model stays at chance for thousands of
steps. Four things make it learn within minutes:

- each step gets a loss of its own at first: a name's last token also predicts its letter;
- few words at first, then more: eight, then half as many again each time they are mastered, until
  every slot is in play (a rule that fits eight words may be a table; one that fits 600 is not);
- short sequences with many look-ups each, before whole questions with one;
- Muon for the matrices, and a high rate for the attention biases, which alone can say "look one
  token back" whatever the words are.

    python -m training.tiny_policy OUT        # rebuilds the shipped weights and prints what they reach
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from tasks import prompts
from training import sft_examples, tiny_policy

IGNORE = -100
LEARNING_RATES = {"matrices": 5e-3, "embeddings": 3e-3, "biases": 3e-2}
REPORT_EVERY = 25  # steps; the pace at which the curriculum looks at its accuracy


@dataclass
class Sequence:
    """Token ids, and for each the target predicted from it with its weight and what it tests."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    probes: list[int] = field(default_factory=list)  # 1 where the accuracy is watched

    def say(self, *tokens: int) -> None:
        """Append tokens that carry no loss."""
        self.ids += tokens
        self.targets += [IGNORE] * len(tokens)
        self.weights += [0.0] * len(tokens)
        self.probes += [0] * len(tokens)

    def ask(self, target: int, weight: float = 1.0, probe: bool = False) -> None:
        """The last token said should predict `target`."""
        self.targets[-1], self.weights[-1], self.probes[-1] = target, weight, int(probe)

    def teach(self, tokens: list[int], weight: float = 1.0) -> None:
        """Append tokens, each to be predicted from the one before it."""
        for token in tokens:
            self.ask(token, weight)
            self.say(token)


class Words:
    """Token ids of what the sequences are made of."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        vocabulary = tokenizer.get_vocab()
        self.slots = sorted(index for piece, index in vocabulary.items() if "<slot" in piece)
        self.letters = [vocabulary["Ġ" + letter] for letter in prompts.LETTERS]
        self.image = vocabulary["<|image_pad|>"]

    def __call__(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text)["input_ids"]
        return self.cache[text]


def stream(words: Words, pool: int, rng: random.Random, level: float) -> Sequence:
    """A stream of words: new ones come with a letter before them, known ones alone; each predicts
    its letter.

    New and known alternate at random, so nothing can be told from places. With rising level
    other tokens come between (up to `B. w1` and gaps), and more words are in play.
    """
    keys = rng.sample(words.slots[:pool], rng.randint(2, 3 + round(2 * level)))
    letters = rng.sample(words.letters, len(keys))
    fillers = words("<think>\n.,;:?!")[1:]
    sequence = Sequence()
    known = 0
    for _ in range(12 + round(8 * level)):
        if rng.random() < level:
            sequence.say(*rng.choices(fillers, k=rng.randint(1, 3)))
        if known == 0 or (known < len(keys) and rng.random() < 0.3):
            sequence.say(*words("\n"), letters[known], *words("<think>.")[1:], keys[known])
            sequence.ask(letters[known])
            known += 1
        else:
            place = rng.randrange(known)
            sequence.say(keys[place])
            sequence.ask(letters[place], probe=known > 1)
    return sequence


def lines(words: Words, pool: int, rng: random.Random, level: float) -> Sequence:
    """The same with names of several words, the more and the more alike the higher the level."""
    longest = 1 + (rng.random() < level) + (rng.random() < level / 2)
    options = names(words, pool, rng, rng.randint(2, 5), longest)
    letters = rng.sample(words.letters, len(options))
    sequence = Sequence()
    _options(sequence, words, letters, options, 1.0)
    if rng.random() < 0.5:
        sequence.say(*rng.choices(words.slots[:pool], k=rng.randint(1, 40)))
    for place in rng.choices(range(len(options)), k=5):
        sequence.say(*words("<think> like")[1:], *options[place])
        sequence.ask(letters[place], probe=True)
    return sequence


def _options(
    sequence: Sequence, words: Words, letters: list[int], options: list[tuple], hints: float
) -> None:
    for letter, name in zip(letters, options, strict=True):
        sequence.say(*words("\n"), letter, *words("<think>.")[1:])
        for word in name:
            sequence.say(word)
            if hints:
                sequence.ask(letter, hints)
    sequence.say(*words("\n"))


def names(words: Words, pool: int, rng: random.Random, number: int, longest: int) -> list[tuple]:
    """Distinct names of 1 to `longest` words that often share a word, as lookalikes do."""
    length = rng.randint(1, longest)
    while True:
        small = [rng.sample(words.slots[:pool], rng.randint(2, number + 1)) for _ in range(longest)]
        found = {}
        for _ in range(10 * number):
            size = length if rng.random() < 0.8 else rng.randint(1, longest)
            found[tuple(rng.choice(small[place]) for place in range(size))] = None
            if len(found) == number:
                return list(found)
        length = min(longest, length + 1)


def questions(
    words: Words,
    pool: int,
    rng: random.Random,
    *,
    longest: int,
    hints: float,
    look_ups: int,
    whole: float,
) -> Sequence:
    """A multiple-choice question, answered `look_ups` times for names drawn from its options.

    `hints` is the weight of the extra loss that a name's last token should predict its letter;
    `whole` the chance that the prompt is given in full, and not its option lines alone.
    """
    options = names(words, pool, rng, rng.randint(2, 5), longest)
    sequence = Sequence()
    in_full = rng.random() < whole
    style = "brief" if rng.random() < 0.8 else "stepwise"
    head, tail = _frame(words, pool, rng, prompts.mcq_question("?", "?", ["?", "?"], style=style))
    if in_full:
        sequence.say(*head)
    letters = words.letters[: len(options)]
    _options(sequence, words, letters, options, hints)
    if in_full:
        sequence.say(*tail)
    for _ in range(look_ups):
        place = rng.randrange(len(options))
        _complete(sequence, words, options[place], [letters[place]], hints)
    return sequence


def open_question(words: Words, pool: int, rng: random.Random) -> Sequence:
    """An open question whose answer repeats the name in the thought."""
    name = rng.sample(words.slots[:pool], rng.randint(1, 3))
    sequence = Sequence()
    style = "brief" if rng.random() < 0.8 else "stepwise"
    head, tail = _frame(words, pool, rng, prompts.open_question("?", "?", style=style))
    sequence.say(*head, *tail)
    _complete(sequence, words, tuple(name), name, 0.0)
    return sequence


def _frame(words: Words, pool: int, rng: random.Random, question: str) -> tuple[list, list]:
    """The tokens before and after a question's options, with random words for noun and kind."""
    first, *_, last = question.split("\n") if "\n" in question else question.split("this? ")
    kind, noun = rng.sample(words.slots[:pool], 2)
    head = words("<|im_start|>user\n<|vision_start|>") + [words.image] * rng.choice((4, 9, 9, 9, 12))
    head = [*head, *words("<|vision_end|>What"), kind, *words("<think> of")[1:], noun]
    head += words("<think> is this?")[1:]
    tail = words(last + "<|im_end|>\n<|im_start|>assistant\n")
    return head, tail


def _complete(
    sequence: Sequence, words: Words, name: tuple, answer: list[int], hints: float
) -> None:
    """Append a completion; the names themselves are taught lightly, for nothing tells which."""
    opening, closing = sft_examples.thought("|").split("|")
    before, between, end = prompts.completion("|", "|").split("|")
    form = 0.1
    sequence.teach(words(before + opening.strip()), form)
    sequence.teach(list(name), form)
    if hints:
        sequence.ask(answer[0], hints)
        sequence.say(*words(closing))
    else:
        sequence.teach(words(closing), form)
    sequence.teach(words(between), form)
    sequence.ask(answer[0], probe=True)
    sequence.say(answer[0])
    sequence.teach(answer[1:])
    sequence.teach(words(end + "<|im_end|>"), form)


@dataclass
class Stage:
    """A step of the curriculum.

    `draw` takes the words, how many slots are in play, a generator and the level. First the slots
    grow from `pool` to all of them, then the level from `level` to 1, whenever the accuracy passes
    0.9; the stage ends when all is in play and `goal` is reached, or after `most` steps.
    """

    name: str
    draw: Callable[[Words, int, random.Random, float], Sequence]
    goal: float
    most: int
    pool: int | None = None  # None: all slots at once
    level: float = 0.0
    batch_size: int = 64
    decay: bool = False


def curriculum() -> list[Stage]:
    """What is learned in which order."""

    def hinted(words: Words, pool: int, rng: random.Random, level: float) -> Sequence:
        if rng.random() > level:
            return lines(words, pool, rng, 1.0)
        return questions(words, pool, rng, longest=3, hints=0.5, look_ups=4, whole=0.3)

    def plain(words: Words, pool: int, rng: random.Random, level: float) -> Sequence:
        if rng.random() < 0.15:
            return open_question(words, pool, rng)
        return questions(words, pool, rng, longest=3, hints=0.0, look_ups=2, whole=0.8)

    return [
        Stage("words", stream, goal=0.97, most=3000, pool=8),
        Stage("names", lines, goal=0.97, most=1000, level=0.1),
        Stage("answers", hinted, goal=0.97, most=1000, level=0.3),
        Stage("questions", plain, goal=1.01, most=300, level=1.0, decay=True),
    ]


def pretrain(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    stages: list[Stage] | None = None,
) -> list[dict]:
    """Teach `model` in place; returns one record per report: stage, step, loss, accuracy, words."""
    words = Words(tokenizer)
    records: list[dict] = []
    for stage in stages or curriculum():
        records += _run(model, words, stage, random.Random(f"{stage.name} {seed}"))
    return records


def _run(
    model: Qwen2_5_VLForConditionalGeneration, words: Words, stage: Stage, rng: random.Random
) -> list[dict]:
    optimizers = _optimizers(model)
    pool, level = stage.pool or len(words.slots), stage.level
    records, losses, hits = [], [], []
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    with tqdm(total=stage.most, desc=stage.name, unit="step") as bar:
        for step in count(1):
            scale = min(1.0, step / 25) * (1.02 - step / stage.most if stage.decay else 1.0) * (1.0 if pool == stage.pool else 0.5)
            batch = [stage.draw(words, pool, rng, level) for _ in range(stage.batch_size)]
            loss, hit = _step(model, batch, optimizers, scale, noise)
            losses, hits = [*losses, loss], [*hits, hit]
            bar.update()
            if step % REPORT_EVERY and step < stage.most:
                continue
            accuracy, loss = sum(hits) / len(hits), sum(losses) / len(losses)
            losses, hits = [], []
            bar.set_postfix(accuracy=f"{accuracy:.3f}", words=pool, level=f"{level:.1f}")
            records.append(
                {"stage": stage.name, "step": step, "loss": loss, "accuracy": accuracy, "words": pool, "level": level}
            )
            full = pool == len(words.slots)
            if step >= stage.most or (full and level == 1.0 and accuracy >= stage.goal):
                return records
            if accuracy > 0.85 and full:
                level = min(1.0, level + 0.1)
            elif accuracy > 0.85:
                pool = min(len(words.slots), pool * 2)
    return records


def _step(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: list[Sequence],
    optimizers: list[torch.optim.Optimizer],
    scale: float,
    noise_source: torch.Generator,
) -> tuple[float, float]:
    """One optimiser step; returns the weighted loss and the accuracy where it is watched."""
    longest = max(len(sequence.ids) for sequence in batch)

    def padded(rows: Iterator[list], fill: float) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    ids = padded((sequence.ids for sequence in batch), 0)
    targets = padded((sequence.targets for sequence in batch), IGNORE)
    weights = padded((sequence.weights for sequence in batch), 0.0)
    probes = padded((sequence.probes for sequence in batch), 0)
    language = model.model.language_model
    embedding = language.embed_tokens.weight
    vectors = functional.embedding(ids, embedding)
    # Where an image will stand there is noise: what is learned must not depend on it.
    seen = ids == model.config.image_token_id
    noise = torch.randn(vectors.shape, generator=noise_source) * embedding.detach().std()
    vectors = torch.where(seen[..., None], noise, vectors)
    asked = targets != IGNORE
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = language(inputs_embeds=vectors, use_cache=False).last_hidden_state
        logits = hidden[asked] @ embedding.T
    each = functional.cross_entropy(logits.float(), targets[asked], reduction="none")
    loss = (each * weights[asked]).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(language.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * scale
        optimizer.step()
        optimizer.zero_grad()
    hits = (logits.argmax(-1) == targets[asked]).float()[probes[asked] == 1]
    return loss.item(), hits.mean().item()


def _optimizers(model: Qwen2_5_VLForConditionalGeneration) -> list[torch.optim.Optimizer]:
    kinds: dict[str, list] = {name: [] for name in LEARNING_RATES}
    for name, value in model.model.language_model.named_parameters():
        matrix = value.ndim == 2 and "embed" not in name
        kinds["matrices" if matrix else "biases" if name.endswith(".bias") else "embeddings"].append(value)
    groups = {name: {"params": kinds[name], "full_lr": rate} for name, rate in LEARNING_RATES.items()}
    return [
        torch.optim.Muon([groups["matrices"]], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([groups["embeddings"], groups["biases"]], betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def matching_accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    number: int = 512,
    longest: int = 3,
) -> float:
    """How often the letter is right, given a thought that names an option; on fresh questions."""
    words, rng = Words(tokenizer), random.Random(f"matching {seed}")
    hits = []
    for _ in range(number):
        sequence = questions(
            words, len(words.slots), rng, longest=longest, hints=0.0, look_ups=1, whole=1.0
        )
        logits = model(input_ids=torch.tensor([sequence.ids])).logits[0].argmax(-1)
        place = sequence.probes.index(1)
        hits.append(float(logits[place] == sequence.targets[place]))
    return sum(hits) / number
