"""Rewards that look at a question's whole group of completions: agreement without labels, and pairs.

A process sees only its own completions, and a group may be spread over several processes. So each
reward first collects the answers of all processes, and then finds a completion's group by the id of
its question, never by its place in the batch.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tasks.language.answers import parse
from tasks.language.vocabulary import Vocabulary
from training.rewards import Reward, letter_reward, text_of


def frequency_reward(vocabulary: Vocabulary, entropy_weight: float) -> Reward:
    """The reward without labels: how often a completion's class was named in its own group.

    It follows TTRV (arXiv 2510.06783). With n completions of a question, of which a share p names the
    completion's class, it is p - entropy_weight x h, with h = -log(p) / log(n). The mean of h over the
    group is the entropy of the group's answers, from 0 (all name one class) to 1 (no two agree). TTRV
    subtracts that mean from every completion. GRPO subtracts the group's mean reward, so that a
    constant of the group would have no gradient; a completion's own part of the entropy has one.

    A completion without a readable class counts as an answer that no other completion gave. It gets
    -entropy_weight, less than any readable one. `vocabulary` reads answers as BuildMCQ does. A question
    that a batch asks twice counts as one group. The returned function takes the column `mcq_id`.
    """

    def frequency_reward(
        completions: Sequence[Any], mcq_id: Sequence[str], **_: Any
    ) -> list[float]:
        own = list(zip(mcq_id, map(named, completions), strict=True))
        everywhere = of_all_processes(own)
        votes = Counter(everywhere)
        sizes = Counter(question for question, _ in everywhere)
        paid = []
        for question, name in own:
            total = sizes[question]
            share = votes[question, name] / total if name is not None else 0.0
            entropy = -math.log(max(share, 1 / total)) / math.log(total) if total > 1 else 0.0
            paid.append(share - entropy_weight * entropy)
        return paid

    def named(completion: Any) -> int | str | None:
        """The class id or the open name that a completion answers; None where it names none."""
        answer = parse(text_of(completion)).answer
        if answer is None:
            return None
        class_id, _, open_name = vocabulary.read(answer)
        return class_id if class_id >= 0 else open_name or None

    return frequency_reward


def contrast_reward(
    completions: Sequence[Any],
    options: Sequence[Sequence[str]],
    answer_letter: Sequence[str],
    mcq_id: Sequence[str],
    pair: Sequence[str],
    **_: Any,
) -> list[float]:
    """The letter reward, times the share of the partner's completions that are right.

    Both questions of a pair show the same options on two images (`training.data.pairs`), and have the
    same `pair`. A policy that is right on the two with the probabilities p and q earns pq on each, so an
    answer that does not follow the picture earns nothing. The gradient is that of pq, with less
    variance than if completions were paired one by one. The factor is the same within a group, so
    advantages must not be divided by the group's standard deviation. A question without a partner, whose `pair`
    is "", pays the letter reward. Raises ValueError where a batch holds half a pair.
    """
    right = letter_reward(completions, options, answer_letter)
    own = list(zip(pair, mcq_id, right, strict=True))
    paid_by: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, question, value in of_all_processes(own):
        paid_by[name][question].append(value)
    paid = []
    for name, question, value in own:
        factor = 1.0
        if name:
            partners = [values for key, values in paid_by[name].items() if key != question]
            if len(partners) != 1:
                raise ValueError(f"the pair {name} is not whole in this batch")
            factor = sum(partners[0]) / len(partners[0])
        paid.append(value * factor)
    return paid


def of_all_processes(rows: list[Any]) -> list[Any]:
    """The rows of all processes, in the order of processes; every process must call it equally often."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
