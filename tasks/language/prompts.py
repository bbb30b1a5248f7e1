"""Builds every prompt of the project: the open and the multiple-choice question, and chats.

A policy is asked the open question (which species is this?) and the multiple-choice question over
candidates. Propose, Train and Evaluate all build them here, so a policy is always asked in the words
it was trained with. The wording is a setting (`[engine] prompt_style`), because a changed prompt
changes every rollout.

Styles: `brief` keeps a prompt to two sentences. `paper` asks what the published runs ask, in our own
words: think, then one name or one letter (arXiv 2511.18305 and its code). It asks neither for traits
nor for a comparison, since training is said to bring these out; only its one-step question of Evaluate
asks for a shortlist first. `stepwise` asks for visible traits and for what tells the options apart,
and so hands the base policy part of what it would learn. `caption` asks for a description of the image
before the reasoning, against answers that skip the image (Visionary-R1, arXiv 2505.14677). `direct`
asks for the answer alone, without a thought (CLS-RL's training without thinking, arXiv 2503.16188).
"""

from collections.abc import Sequence
from typing import Any

from data_cards import Card
from tasks.runtime.errors import StageError, first_line

THINK = "<think>"
TAGS = (THINK, "</think>", "<answer>", "</answer>", "<caption>", "</caption>")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STYLES = ("brief", "paper", "stepwise", "caption", "direct")
PROMPTS = ("open", "closed_list")  # the open question, without and with the names it may be
LIST_POSITIONS = ("in_question", "before_image")  # of a closed list

_OPEN_TAIL = {
    "brief": "Think between <think> and </think>. Then give one name between <answer> and </answer>.",
    "paper": (
        "Think first, between <think> and </think>. Then give the one most likely name between "
        "<answer> and </answer>."
    ),
    "stepwise": (
        "First reason step by step between <think> and </think>: describe the traits you can see "
        "and what they speak for. Then give the one most likely name between <answer> and </answer>."
    ),
    "caption": (
        "First describe what you see between <caption> and </caption>. Then think between <think> "
        "and </think>. Then give one name between <answer> and </answer>."
    ),
    "direct": "Give one name between <answer> and </answer>, and write nothing else.",
}
# The greedy question of Evaluate, in the styles that ask it in words of its own.
_ONE_STEP_TAIL = {
    "paper": (
        "Between <think> and </think>, first list the five most likely names, and then think about "
        "what tells these five apart. Then give the one most likely name between <answer> and "
        "</answer>."
    ),
}
_EITHER, _LETTER = "one option, by letter or name,", "the letter of one option"
_MCQ_TAIL = {
    "brief": (
        f"Think between <think> and </think>. Then give {_EITHER} between <answer> and </answer>."
    ),
    "paper": (
        "Think first, between <think> and </think>. Then give the letter of the one most likely "
        "option between <answer> and </answer>."
    ),
    "stepwise": (
        "First reason step by step between <think> and </think>: say which visible traits tell the "
        "options apart and which of them this image shows. Then give the letter of exactly one "
        "option between <answer> and </answer>."
    ),
    "caption": (
        "First describe what you see between <caption> and </caption>. Then think between <think> "
        f"and </think>. Then give {_EITHER} between <answer> and </answer>."
    ),
    "direct": f"Give {_EITHER} between <answer> and </answer>, and write nothing else.",
}


def open_question(
    noun: str,
    kind: str,
    *,
    style: str = "brief",
    names: Sequence[str] | None = None,
    one_step: bool = False,
) -> str:
    """The open question; with `names` its closed-list form, which shows the allowed names.

    `noun` is what the images show ("bird"), `kind` is what the question asks for ("species").
    `one_step` is for a greedy answer that stands alone, which some styles ask for in other words.
    """
    parts = [f"What {kind} of {noun} is this?"]
    if names is not None:
        parts.append(listed(names))
    tails = {**_OPEN_TAIL, **_ONE_STEP_TAIL} if one_step else _OPEN_TAIL
    return " ".join([*parts, _tail(tails, style)])


def mcq_question(noun: str, kind: str, options: Sequence[str], *, style: str = "brief") -> str:
    """The multiple-choice question: one option a line, lettered from A in the given order."""
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"a question needs 2 to {len(LETTERS)} options, got {len(options)}")
    lines = [f"What {kind} of {noun} is this?"]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*lines, _tail(_MCQ_TAIL, style)])


def by_letter(question: str) -> str:
    """A multiple-choice question that asks for a letter alone, for trainers that read nothing else."""
    text, _, tail = question.rpartition("\n")
    return "\n".join(filter(None, (text, tail.replace(_EITHER, _LETTER))))


def style_of(question: str) -> str:
    """The prompt style whose words end a question; `brief` where it ends otherwise."""
    tails = [pair for of_kind in (_OPEN_TAIL, _MCQ_TAIL) for pair in of_kind.items()]
    return next((style for style, tail in tails if question.endswith(tail)), "brief")


def listed(names: Sequence[str]) -> str:
    """One sentence that lists the allowed names."""
    return "It is one of these: " + "; ".join(names) + "."


def card_question(
    card: Card,
    prompt: str,
    names: list[str],
    *,
    style: str,
    list_position: str,
    one_step: bool = False,
) -> tuple[str, str]:
    """(text before the image, the open question of a card after it).

    `prompt` is one of PROMPTS. With closed_list the allowed names stand in the question, or before
    the image (`list_position`), where an engine computes them once for all images. `one_step` is as
    in `open_question`.
    """
    allowed = names if prompt == "closed_list" else None
    ahead = allowed is not None and list_position == "before_image"
    shown = None if ahead else allowed
    text = open_question(card.noun, card.kind, style=style, names=shown, one_step=one_step)
    return listed(names) if ahead else "", text


def chat(text: str, before: str = "") -> list[dict]:
    """One user turn in the form that chat templates take: text `before`, the image, then `text`."""
    ahead = [{"type": "text", "text": before}] if before else []
    return [
        {"role": "user", "content": [*ahead, {"type": "image"}, {"type": "text", "text": text}]}
    ]


def rendered(processor: Any, messages: list[dict]) -> str:
    """A chat as the text that its processor takes, up to the place where the answer begins.

    Some chat templates write the BOS token that their tokenizer adds as well (Gemma, Llama). It is
    removed here, or the policy would be asked with two of them and trained with one. Raises StageError
    where the template itself raises an error.
    """
    from jinja2 import TemplateError

    try:
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise StageError(
            f"the policy's chat template refuses the question: {first_line(error)}; use a model that "
            "takes one user turn with an image, or change its chat_template.jinja"
        ) from error
    tokenizer = processor.tokenizer
    if tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def opening(processor: Any) -> str:
    """The <think> with which a chat template ends a prompt, or "" where it ends otherwise.

    Such a tag belongs to the completion, which goes on after it. So it is put back before a completion is
    read, and left out where a completion is appended to a prompt.
    """
    return THINK if rendered(processor, chat("?")).rstrip().endswith(THINK) else ""


def completion(thought: str, answer: str, style: str = "brief") -> str:
    """A completion in the form that a prompt style asks for, as supervised training teaches it.

    With `direct` it has no thought. With `caption` the thought stands as the caption as well.
    """
    if style == "direct":
        return f"<answer>{answer}</answer>"
    caption = f"<caption>{thought}</caption>" if style == "caption" else ""
    return f"{caption}<think>{thought}</think><answer>{answer}</answer>"


def _tail(tails: dict[str, str], style: str) -> str:
    if style not in tails:
        raise ValueError(f"prompt_style must be one of {', '.join(STYLES)}; got {style!r}")
    return tails[style]
