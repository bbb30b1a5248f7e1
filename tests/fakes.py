"""An engine without a model: a stage's logic runs in milliseconds.

It knows the truth from the image's path (`card/split/class name/file`) and answers it about half
of the time, in several spellings; the rest are lookalikes, unknown names and broken answers.
"""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np

from tasks.engines.base import Completion, EngineDied, Request, Sampling
from tasks.engines.settings import EngineSettings
from tasks.runtime.errors import StageError

AILS = "FAKE_ENGINE_AILS"  # the variable that holds what ails an AilingEngine
SPELLINGS = (str, str.upper, lambda name: name.replace("-", " "), lambda name: f"the {name}.")


class FakeEngine:
    """Deterministic in (image, sample number, sampling seed)."""

    constrained = True

    def __init__(self, policy: Path, settings: EngineSettings):
        self.pause = 0.0

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
            if request.choices:
                assert answer in request.choices
                return Completion(answer, "stop", 1, -draw)
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
    made = FakeEngine(policy, settings)
    made.pause = 0.3
    return made


def free_engine(policy, settings) -> FakeEngine:
    """An engine without structured output."""
    made = FakeEngine(policy, settings)
    made.constrained = False
    return made


class AilingEngine(FakeEngine):
    """Refuses, dies or starves as JSON in the environment says; what happened is noted in a folder.

    `refuse` and `kill` are parts of image ids; `deaths` is how many engines die on a batch with
    such an image, by themselves or, with `give_up`, by saying so. `batch` is the largest batch
    that does not kill it.
    """

    def __init__(self, policy: Path, settings: EngineSettings):
        super().__init__(policy, settings)
        self.ails = json.loads(os.environ[AILS])
        self.pause = self.ails.get("pause", 0.0)
        self.notes = Path(self.ails["notes"])
        self.slots = self.ails.get("slots", 1)
        self.counts = {"prompt_tokens": 0, "cached_tokens": 0}
        self.note("opened", str(settings.max_num_seqs))

    def note(self, kind: str, text: str) -> None:
        with (self.notes / kind).open("a") as file:
            file.write(f"{os.getpid()} {text}\n")

    def check(self, request: Request) -> None:
        self.note("checked", f"{request.key} {len(request.text)}")
        if "too long" in self.ails:
            raise StageError("the longest prompt has 999 tokens")

    def generate(self, requests, sampling):
        self.note("asked", " ".join(request.key for request in requests))
        ill = [r for r in requests if self.ails.get("kill") and self.ails["kill"] in r.key]
        died = (
            (self.notes / "died").read_text().count("\n") if (self.notes / "died").exists() else 0
        )
        if (ill and died < self.ails["deaths"]) or len(requests) > self.ails.get("batch", 10**9):
            self.note("died", ill[0].key if ill else "too many")
            if self.ails.get("give_up"):
                raise EngineDied("out of memory")
            os.kill(os.getpid(), signal.SIGKILL)
        if any(self.ails.get("refuse", "\0") in request.key for request in requests):
            raise ValueError("cannot look at this")
        self.counts["prompt_tokens"] += 10 * len(requests)
        self.counts["cached_tokens"] += 4 * len(requests)
        return super().generate(requests, sampling)


def ailing(policy, settings) -> AilingEngine:
    """An AilingEngine in this process."""
    return AilingEngine(policy, settings)


def isolated(policy, settings) -> AilingEngine:
    """An AilingEngine in a process of its own."""
    return AilingEngine(policy, settings)


isolated.isolated = True
