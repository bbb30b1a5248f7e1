"""Trainings with completions that do not depend on who generates them: `torchrun ... FILE CONFIG...`.

Sampling differs from process to process. With completions fixed by the question and the place in
its group, one process and two must compute the same loss from the same global batch.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

from tasks.runtime.command import main
from tests.training import answering
from training.grpo import grpo
from training.loop import sampling
from training.loop.sampling import Timed


class Fixed:
    """Mixed into the trainer: completions drawn from the prompt's tokens and the place alone."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = self.accelerator.process_index * len(prompt_ids)
        return [self._drawn(ids, first + i) for i, ids in enumerate(prompt_ids)], None

    def _drawn(self, prompt_ids, place):
        key = f"{list(prompt_ids)} {place % self.num_generations}"
        rng = random.Random(hashlib.sha256(key.encode()).digest())
        return [rng.randrange(20, 900) for _ in range(rng.randint(2, 7))] + [2]


class FixedTimed(Timed, Fixed):
    """Takes the place of Timed, which stands right before TRL's own trainer."""


def fixed(pairs: bool) -> type[Timed]:
    """What takes the place of Timed; questions in pairs get answers, which their rewards go by."""
    return answering.timed(["A", "B", "C", "A"]) if pairs else FixedTimed


if __name__ == "__main__":
    for config in sys.argv[1:]:
        sys.argv[1:] = [config]
        asked = json.loads(Path(config).read_text(encoding="utf-8"))
        sampling.Timed = fixed(asked.get("pairs", False))  # type: ignore[misc]
        main(grpo)
