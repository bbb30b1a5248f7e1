"""Reward functions in TRL's form: `(completions, **columns) -> list[float]`, one per completion.

Rewards and evaluation count alike: both read answers by `tasks.language.answers` and class names by
`tasks.language.class_names`. The paper's reward is `format_reward` plus `letter_reward`, each 0 or 1
(arXiv 2511.18305, section 3). `exact_reward` is the baseline on open questions.
`virft_compat_reward` is that baseline as Visual-RFT computes it, to reproduce its numbers.

A reward raises for a column of the wrong length, which is the caller's mistake, and never for the
text of a completion. To use another reward, write a function of this form. Dataset columns (listed at
`training.data.dataset.training_row`) and `completion_ids` arrive as keyword arguments, as lists as
long as `completions`. `training.data.reward_choice` finds rewards by name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_cards import Card
from tasks.language.answers import choose, in_form, parse, reasoning
from tasks.language.class_names import ClassNames
from tasks.language.prompts import LETTERS
from tasks.language.taxonomy import Taxonomy
from tasks.runtime.errors import StageError

Reward = Callable[..., list[float]]  # a user's own may return None for a completion: not scored


def text_of(completion: Any) -> str:
    """The text of a completion: a string, or the assistant's messages in TRL's chat form.

    A message's content is a string, or a list of parts, of which those of type "text" count.
    Anything else has the text "".
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        return ""
    spoken = (
        message.get("content")
        for message in completion
        if isinstance(message, Mapping) and message.get("role", "assistant") == "assistant"
    )
    return "".join(_content(content) for content in spoken)


def format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for one think block, then one non-empty answer block, and nothing else but white space.

    If the chat template ends the prompt with <think>, completions lack that tag. It must be put back
    before this reward is called.
    """
    return [float(in_form(text_of(completion), "brief")) for completion in completions]


def letter_reward(
    completions: Sequence[Any],
    options: Sequence[Sequence[str]],
    answer_letter: Sequence[str],
    **_: Any,
) -> list[float]:
    """1 for naming the right option of a multiple-choice question, by letter, by text, or both.

    `options` holds each question's option texts, `answer_letter` the right one's letter.
    """
    return [
        float(choose(text_of(completion), texts).index == LETTERS.index(letter))
        for completion, texts, letter in zip(completions, options, answer_letter, strict=True)
    ]


def difficulty_weighted_reward(
    completions: Sequence[Any],
    options: Sequence[Sequence[str]],
    answer_letter: Sequence[str],
    truth_share: Sequence[float],
    **_: Any,
) -> list[float]:
    """The letter reward, times 2 minus the share of the policy's rollouts that named the truth.

    A question whose truth no rollout named pays 2; one whose truth every rollout named pays 1. The
    factor is the same within a group, so advantages divided by the group's standard deviation lose it.
    """
    right = letter_reward(completions, options, answer_letter)
    return [reward * (2 - share) for reward, share in zip(right, truth_share, strict=True)]


def overlong_reward(longest: int, buffer: int) -> Reward:
    """0 for completions of up to `longest` - `buffer` tokens, then falling to -1 at `longest`.

    The soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4). The returned function takes
    the column `completion_ids`.
    """

    def overlong_reward(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        room = [longest - len(ids) for ids in completion_ids]
        return [min(0.0, left / buffer - 1) if left < buffer else 0.0 for left in room]

    return overlong_reward


def think_length_reward(
    card: Card, count_tokens: Callable[[str], int], target: int, limit: int
) -> Reward:
    """The reward that pays a right answer for a short thought, and a wrong answer nothing.

    1 for a thought of up to `target` tokens, then falling evenly to 0 at `limit` tokens. ReFine-RFT
    also rewards the length of the thought, beside format and accuracy (arXiv 2601.06993). The thought is
    the think block or, without one, all text before the answer. `count_tokens` counts the policy's tokens in
    it, since `max_completion_length` and the log count tokens, too. The right answer is the one that
    `letter` pays for or, to an open question, `exact`. The returned function takes the columns
    `options`, `answer_letter` and `label`, the class id.
    """
    classes = ClassNames.of(card)

    def think_length_reward(
        completions: Sequence[Any],
        options: Sequence[Sequence[str]],
        answer_letter: Sequence[str],
        label: Sequence[int],
        **_: Any,
    ) -> list[float]:
        paid = []
        for completion, texts, letter, truth in zip(
            completions, options, answer_letter, label, strict=True
        ):
            text = text_of(completion)
            if len(texts) > 1:
                right = choose(text, texts).index == LETTERS.index(letter)
            else:
                right = classes.match(parse(text).answer or "").class_id == truth
            over = max(0, count_tokens(reasoning(text)) - target) if right else 0
            paid.append(max(0.0, 1 - over / (limit - target)) if right else 0.0)
        return paid

    return think_length_reward


def caption_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for a non-empty caption block, followed by text that `format_reward` accepts.

    Describing the image before reasoning about it is Visionary-R1's remedy for answers that skip
    the image (arXiv 2505.14677); `[engine] prompt_style = caption` asks for it.
    """
    return [float(in_form(text_of(completion), "caption")) for completion in completions]


def direct_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for one non-empty answer block, and nothing else but white space: no thought, no other text.

    CLS-RL trains so without thinking (arXiv 2503.16188); `[engine] prompt_style = direct` asks for it.
    """
    return [float(in_form(text_of(completion), "direct")) for completion in completions]


def exact_reward(
    names: Sequence[str] | ClassNames, aliases: Mapping[str, Sequence[str]] | None = None
) -> Reward:
    """The reward for an open question over these classes: 1 when the answer names the right one.

    `names` are class names with their `aliases`, or a card's names as evaluation reads them. The
    returned function takes the column `label`, the class id. The whole answer must be the class's
    name, in any spelling that `tasks.language.class_names` accepts; a list of names earns 0.
    """
    classes = names if isinstance(names, ClassNames) else ClassNames(names, aliases)

    def exact_reward(completions: Sequence[Any], label: Sequence[int], **_: Any) -> list[float]:
        answers = [parse(text_of(completion)).answer for completion in completions]
        return [
            float(answer is not None and classes.match(answer).class_id == class_id)
            for answer, class_id in zip(answers, label, strict=True)
        ]

    return exact_reward


def graded_reward(card: Card) -> Reward:
    """The reward that pays an answer in part for the right groups of the card's taxonomy.

    It is the answer's depth (`tasks.language.taxonomy`): 1 for the right class and, with one level of
    groups, 1/2 for another class of the right genus. So its weight beside `exact` or `letter` decides
    which part of the point a genus earns. To an open question the genus may be named alone. The
    returned function takes the columns `options` (two or more of a multiple-choice question) and
    `label`, the class id.
    """
    classes = ClassNames.of(card)
    taxonomy = Taxonomy.of(card)
    if not taxonomy:
        raise StageError(
            f"[Train] rewards: graded needs a taxonomy, and the data card {card.name} has none"
        )

    def graded_reward(
        completions: Sequence[Any],
        options: Sequence[Sequence[str]],
        label: Sequence[int],
        **_: Any,
    ) -> list[float]:
        paid = []
        for completion, texts, truth in zip(completions, options, label, strict=True):
            text = text_of(completion)
            if len(texts) > 1:
                place = choose(text, texts).index
                answer = "" if place is None else texts[place]
            else:
                answer = parse(text).answer or ""
            paid.append(taxonomy.depth(truth, classes.match(answer).class_id, answer))
        return paid

    return graded_reward


def virft_compat_reward(names: Sequence[str]) -> Reward:
    """Visual-RFT's classification reward, faults included; only to reproduce its numbers.

    1 when the answer contains the class name or the class name contains the answer, ignoring case,
    spaces and underscores. So an empty answer earns 1, as does a list of all classes. Without an
    answer block on one line the whole completion is the answer. To keep these faults, it does not use
    `tasks.language.answers`. The returned function takes the column `label`, the class id.
    """
    truths = [_squeezed(name) for name in names]

    def virft_compat_reward(
        completions: Sequence[Any], label: Sequence[int], **_: Any
    ) -> list[float]:
        rewards = []
        for completion, class_id in zip(completions, label, strict=True):
            answer, truth = _squeezed(_first_block(text_of(completion))), truths[class_id]
            rewards.append(float(truth in answer or answer in truth))
        return rewards

    return virft_compat_reward


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = (part for part in content if isinstance(part, Mapping) and part.get("type") == "text")
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _first_block(text: str) -> str:
    """The first answer block that opens and closes on one line, else the whole text."""
    for line in text.split("\n"):
        start = line.find("<answer>")
        end = line.find("</answer>", start + len("<answer>")) if start >= 0 else -1
        if end >= 0:
            return line[start + len("<answer>") : end].strip()
    return text.strip()


def _squeezed(text: str) -> str:
    return text.replace(" ", "").replace("_", "").lower()
