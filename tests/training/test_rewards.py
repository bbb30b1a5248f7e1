"""What rewards pay for, and that no completion can break them."""

import json
import random
import subprocess
import sys

import pytest

from tasks.language.prompts import completion
from training.rewards import (
    exact_reward,
    format_reward,
    letter_reward,
    text_of,
    virft_compat_reward,
)

OPTIONS = ["Laysan Albatross", "Black-footed Albatross", "Sooty Albatross"]
PETS = ["boxer", "beagle", "Bengal", "Saint Bernard"]


def said(answer: str) -> str:
    return completion("Dark wings.", answer)


def chat(text: object) -> list[dict]:
    return [{"role": "assistant", "content": text}]


TEXTS = [
    ("hello", "hello", "a string"),
    (chat("hello"), "hello", "one message"),
    (chat([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]), "hello", "parts"),
    (chat([{"type": "image"}, {"type": "text", "text": "hello"}]), "hello", "an image among them"),
    ([{"role": "tool", "content": "no"}, *chat("hello")], "hello", "only the assistant speaks"),
    ([{"content": "hello"}], "hello", "a role left out"),
    ([*chat("hel"), *chat("lo")], "hello", "two messages"),
    (chat(None), "", "no content"),
    (chat([None, 3, {"type": "text"}, {"type": "text", "text": None}]), "", "broken parts"),
    ([None, "hello", 3], "", "no messages"),
    ([], "", "nothing"),
    (None, "", "nothing"),
    (3, "", "nothing"),
]


@pytest.mark.parametrize(("given", "text", "why"), TEXTS)
def test_text_of(given, text, why):
    assert text_of(given) == text, why


FORMATS = [
    (said("B"), 1.0, "as asked"),
    (said("B") + "\n", 1.0, "a trailing newline is no fault"),
    (said("Nonsense"), 1.0, "format says nothing about the answer"),
    (said(""), 0.0, "an empty answer"),
    (said("A") + "<answer>B</answer>", 0.0, "several answers"),
    ("<answer>B</answer>", 0.0, "no thought"),
    ("", 0.0, "nothing"),
]


@pytest.mark.parametrize(("text", "reward", "why"), FORMATS)
def test_format_reward(text, reward, why):
    assert (
        format_reward([text]) == format_reward(completions=[chat(text)], label=[0]) == [reward]
    ), why


LETTERS_SAID = [
    (said("B"), 1.0, "the letter"),
    (said("(B)"), 1.0, "the letter, decorated"),
    (said("B. Black Footed Albatross"), 1.0, "letter and text agree"),
    (said("black-footed albatross"), 1.0, "the text"),
    ("<answer>B</answer>", 1.0, "format is another reward's business"),
    (said("A"), 0.0, "a wrong letter"),
    (said("A or B"), 0.0, "a hedge"),
    (said("B. Sooty Albatross"), 0.0, "letter and text disagree"),
    (said("A, B, C"), 0.0, "a list of everything"),
    (said("B") + "<answer>B</answer>", 0.0, "two answer blocks"),
    (said(""), 0.0, "an empty answer"),
    ("B", 0.0, "no answer block"),
]


@pytest.mark.parametrize(("text", "reward", "why"), LETTERS_SAID)
def test_letter_reward(text, reward, why):
    columns: dict = {"options": [OPTIONS], "answer_letter": ["B"], "mcq_id": ["x"]}
    assert letter_reward([text], **columns) == letter_reward([chat(text)], **columns) == [reward], (
        why
    )


@pytest.mark.parametrize("options", [["猫", "狗"], ["3", "7"], ["α", "β"]])
def test_an_option_of_one_sign_earns_the_reward_by_letter_and_by_text(options):
    right = options[1]
    texts = [said(right), said(f"B. {right}"), said("B"), said(f"A. {right}"), said(options[0])]
    columns = {"options": [options] * 5, "answer_letter": ["B"] * 5}
    assert letter_reward(texts, **columns) == [1, 1, 1, 0, 0]
    answers = exact_reward(options)(texts[:1] + texts[4:], label=[1, 1])
    assert answers == [1, 0]


def test_each_completion_meets_its_own_question():
    options = [OPTIONS, OPTIONS, OPTIONS[:2]]
    completions = [said("A"), said("A"), said("C")]
    assert letter_reward(completions, options=options, answer_letter=["A", "B", "B"]) == [
        1.0,
        0.0,
        0.0,
    ]


NAMES_SAID = [
    (said("boxer"), 1.0, "the name"),
    (said("The Boxer."), 1.0, "the name, decorated"),
    (said("German boxer"), 1.0, "an alias"),
    (said("boxer, beagle, bengal"), 0.0, "a list of names"),
    (said("boxer or beagle"), 0.0, "a hedge"),
    (said("box"), 0.0, "part of the name"),
    (said("a boxer on a lawn"), 0.0, "the name and more"),
    (said("beagle"), 0.0, "another class"),
    (said(""), 0.0, "an empty answer"),
    ("boxer", 0.0, "no answer block"),
]


@pytest.mark.parametrize(("text", "reward", "why"), NAMES_SAID)
def test_exact_reward(text, reward, why):
    rewards = exact_reward(PETS, {"boxer": ["German boxer"]})
    assert (
        rewards([text], label=[0], image_id=["x"]) == rewards([chat(text)], label=[0]) == [reward]
    )
    assert rewards.__name__ == "exact_reward", "the trainer logs a reward under its function's name"


COMPAT = [
    (said("boxer"), 1.0, "the name"),
    (said("BOX ER"), 1.0, "without regard to case and spaces"),
    (said("boxer, beagle, bengal"), 1.0, "fault kept: a list of all classes scores"),
    (said("box"), 1.0, "fault kept: so does part of the name"),
    (said(""), 1.0, "fault kept: so does an empty answer"),
    ("", 1.0, "fault kept: so does saying nothing"),
    ("I see a boxer", 1.0, "fault kept: no block, so all of it counts"),
    ("<think>boxer</think><answer>\nbeagle\n</answer>", 1.0, "fault kept: a block on three lines"),
    (said("beagle") + "<answer>boxer</answer>", 0.0, "the first block counts"),
    (said("beagle"), 0.0, "another class"),
]


@pytest.mark.parametrize(("text", "reward", "why"), COMPAT)
def test_virft_compat_reward_keeps_the_faults_it_reproduces(text, reward, why):
    rewards = virft_compat_reward(PETS)
    assert rewards([text], label=[0]) == rewards([chat(text)], label=[0]) == [reward], why


def test_listing_and_saying_nothing_earn_nothing():
    """Elsewhere a list of classes and an empty answer earned the full reward."""
    texts = [said(", ".join(PETS)), said(""), "", said("A, B, C"), said("any of them")]
    assert exact_reward(PETS)(texts, label=[0] * 5) == [0.0] * 5
    assert letter_reward(texts, options=[OPTIONS] * 5, answer_letter=["A"] * 5) == [0.0] * 5


def test_rewards_never_raise():
    rng = random.Random(11)
    pieces = ("<answer>", "</answer>", "<think>", "</think>", "B", "boxer", "\ud800", "\x00", "\n")
    texts: list = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(500)]
    texts += [chat(text) for text in texts] + [given for given, _, _ in TEXTS]
    texts += [said("B" * 1_000_000), "<answer>" * 100_000, None, {"role": "assistant"}, b"bytes"]
    many = len(texts)
    scores = [
        format_reward(texts),
        letter_reward(texts, options=[OPTIONS] * many, answer_letter=["B"] * many),
        exact_reward(PETS)(texts, label=[0] * many),
        virft_compat_reward(PETS)(texts, label=[0] * many),
    ]
    assert all(len(score) == many and set(score) <= {0.0, 1.0} for score in scores)


def test_a_column_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        letter_reward([said("B")] * 2, options=[OPTIONS], answer_letter=["B"])


def test_rewards_load_without_the_torch_world():
    script = (
        "import json, sys, training.rewards, tasks.evaluation.metrics; "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "trl", "vllm", "luigi"} & set(json.loads(shown.stdout))
