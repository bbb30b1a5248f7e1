"""Rewards of a whole group: groups go by question, whatever the order and the number of processes."""

import json
import math
import os
import subprocess
import sys

import pytest

import data_cards
from tests.conftest import ROOT, settings_of
from training.data.reward_choice import choose_rewards
from training.rewards import exact_reward
from training.settings import TrainSettings

SAID = "<think>x</think><answer>{}</answer>"
NO_TAGS = "no tags"
SPREAD = """
import json, sys
import torch.distributed as dist
dist.init_process_group("gloo")
from data_cards import Card
from tasks.language.vocabulary import Vocabulary
from tasks.language.class_names import ClassNames
from training.data.group_rewards import frequency_reward
rank = dist.get_rank()
names = ClassNames(["robin", "wren"])
reward = frequency_reward(Vocabulary(names, frozenset([0, 1])), 0.5)
said = ["<answer>%s</answer>" % name for name in (["robin", "wren", "robin"], ["robin", "wren", "?"])[rank]]
paid = reward(said, mcq_id=(["a", "b", "a"], ["a", "b", "b"])[rank])
everyone = [None, None]
dist.all_gather_object(everyone, paid)
if rank == 0:
    print(json.dumps(everyone))
dist.destroy_process_group()
"""


def frequency(card, weight: float = 0.5, **reading):
    settings = settings_of(TrainSettings, rewards={"frequency": 1.0}, entropy_weight=weight)
    read = {card.name: reading} if reading else None
    (reward,) = choose_rewards(settings, [card], len, read)

    def paid(completions: list[str], questions: str) -> list[float]:
        return reward(completions, mcq_id=list(questions), card=[card.name] * len(completions))

    return paid


def entropy(*counts: int) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts) / math.log(total)


def test_a_completion_is_paid_by_how_often_its_class_was_named(few_beetles):
    rose, teal = few_beetles.classes[:2]
    said = [SAID.format(name) for name in (rose, rose.upper(), f"the {rose}.", teal)]
    share = frequency(few_beetles, 0.0)(said, "aaaa")
    assert share == [0.75, 0.75, 0.75, 0.25], "spellings are one class"
    paid = frequency(few_beetles, 0.5)(said, "aaaa")
    assert sum(paid) / 4 == pytest.approx(sum(share) / 4 - 0.5 * entropy(3, 1))
    assert len(set(paid)) == 2, "the entropy is no constant of the group, which GRPO would lose"
    assert paid[0] - paid[3] > share[0] - share[3]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_what_names_no_class_gets_the_least(few_beetles, weight):
    rose, teal, amber = few_beetles.classes[:3]
    said = [SAID.format(name) for name in (rose, teal, amber, f"{rose} or {teal}")]
    *named, unread, silent = frequency(few_beetles, weight)([*said, NO_TAGS], "aaaaa")
    assert unread == silent == -weight < min(named)
    assert frequency(few_beetles, weight)([NO_TAGS, NO_TAGS], "aa") == [-weight, -weight]
    assert frequency(few_beetles, weight)([SAID.format(rose)] * 2, "aa") == [1.0, 1.0]
    assert frequency(few_beetles, weight)([SAID.format(rose)], "a") == [1.0]
    assert frequency(few_beetles, weight)([], "") == []


def test_a_group_is_found_by_its_question_and_not_by_its_place(few_beetles):
    rose, teal = few_beetles.classes[:2]
    reward = frequency(few_beetles)
    first, second = [rose, rose, teal, rose], [teal, teal, "?", rose]
    alone = [
        reward([SAID.format(n) for n in names], q * 4) for names, q in ((first, "a"), (second, "b"))
    ]
    mixed = [SAID.format(name) for pair in zip(first, second, strict=True) for name in pair]
    together = reward(mixed, "abababab")
    assert (together[::2], together[1::2]) == tuple(alone)


def test_open_names_agree_as_candidates_do(few_beetles):
    said = [SAID.format(name) for name in ("striped weevil", "Striped Weevils", "maybe a weevil")]
    assert frequency(few_beetles, 0.0)(said, "aaa") == [0.0, 0.0, 0.0]
    paid = frequency(few_beetles, 0.0, vocabulary="open")(said, "aaa")
    assert paid == pytest.approx([2 / 3, 2 / 3, 0.0])
    rose = few_beetles.classes[0]
    misspelt = [SAID.format(name) for name in (rose, rose.replace("rose", "roze"))]
    assert frequency(few_beetles, 0.0)(misspelt, "aa") == [0.5, 0.0]
    near = {"fuzzy_threshold": 90.0, "fuzzy_margin": 5.0}
    assert frequency(few_beetles, 0.0, **near)(misspelt, "aa") == [1.0, 1.0]


def test_each_completion_is_read_with_its_own_cards_names_and_reading(few_beetles):
    text = (data_cards.FOLDER / "few.md").read_text().replace("rose gold-belt", "robin")
    (data_cards.FOLDER / "bugs.md").write_text(text)
    cards = [few_beetles, data_cards.load("bugs")]
    settings = settings_of(TrainSettings, rewards={"frequency": 1.0}, entropy_weight=0.0)
    (reward,) = choose_rewards(settings, cards, len, {"few": {"vocabulary": "open"}})
    said = [SAID.format(name) for name in ("robin", "robin", "a weevil", "a weevil")]
    paid = reward(said, mcq_id=list("abcd"), card=["few", "bugs"] * 2)
    assert paid == [1.0, 1.0, 1.0, 0.0], "a robin is a class of bugs, and a weevil of neither"


def test_the_answer_is_read_as_the_labelled_reward_reads_it(few_beetles):
    texts = (SAID.format(few_beetles.classes[0]), "<answer></answer>", NO_TAGS, SAID.format("A, B"))
    settings = settings_of(TrainSettings, rewards={"exact": 1.0})
    (exact,) = choose_rewards(settings, [few_beetles], len)
    right = exact(list(texts), label=[0] * 4, card=["few"] * 4, mcq_id=list("aaaa"))
    agreed = frequency(few_beetles, 0.0)(list(texts), "abcd")
    assert agreed == right == [1.0, 0.0, 0.0, 0.0]
    assert exact_reward(few_beetles.classes)([texts[0]], label=[0]) == [1.0]


@pytest.mark.process
def test_a_group_may_be_spread_over_processes(tmp_path):
    """Question a has three completions, one on the other process; b has three, two there."""
    (tmp_path / "spread.py").write_text(SPREAD)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend",
         "c10d", "--rdzv_endpoint", "127.0.0.1:0", "spread.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert (first[0], first[2], second[0]) == (1.0, 1.0, 1.0)
    two_of_three = 2 / 3 - 0.5 * -math.log(2 / 3) / math.log(3)
    assert (first[1], second[1], second[2]) == pytest.approx((two_of_three, two_of_three, -0.5))
