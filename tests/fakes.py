"""An engine without a model: a stage's logic runs in milliseconds.

It knows the truth from the image's path (`card/split/class name/file`) and answers it about half
of the time, in several spellings; the rest are lookalikes, unknown names and broken answers.
"""

import hashlib
import re
import time

import numpy as np

from tasks.engine import Completion, Request, Sampling

SPELLINGS = (str, str.upper, lambda name: name.replace("-", " "), lambda name: f"the {name}.")


class FakeEngine:
    """Deterministic in (image, sample number, sampling seed)."""

    def __init__(self, policy, settings):
        self.pause = float(settings.get("pause", 0))

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        time.sleep(self.pause)
        return [[self._answer(r, i, sampling) for i in range(sampling.n)] for r in requests]

    def _answer(self, request: Request, number: int, sampling: Sampling) -> Completion:
        digest = hashlib.sha256(f"{request.key}/{number}/{sampling.seed}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        truth = request.key.split("/")[2]
        options = dict(re.findall(r"^([A-Z])\. (.+)$", request.text, re.MULTILINE))
        body, belt = truth.rsplit(" ", 1)
        draw = random.random()
        if options:
            right = [letter for letter, name in options.items() if name == truth]
            answer = right[0] if right and draw < 0.7 else random.choice(list(options))
        elif draw < 0.5:
            answer = SPELLINGS[random.integers(len(SPELLINGS))](truth)
        elif draw < 0.8:
            answer = f"{random.choice(['crimson', 'amber', 'gold', 'teal'])} {belt}"
        elif draw < 0.9:
            answer = "some unheard-of beetle"
        else:
            return Completion("no tags at all", "length", 9, -1.0 - draw)
        return Completion(f"<think>{body}?</think><answer>{answer}</answer>", "stop", 9, -draw)


def engine(policy, settings) -> FakeEngine:
    """`[engine] backend = tests.fakes:engine`."""
    return FakeEngine(policy, settings)


def slow_engine(policy, settings) -> FakeEngine:
    """A tenth of a second a shard, so that a test can kill a stage in the middle."""
    return FakeEngine(policy, {**settings, "pause": 0.3})
