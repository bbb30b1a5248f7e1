"""Training with completions that do not depend on who generates them: `torchrun ... FILE CONFIG`.

Sampling differs from process to process. With completions fixed by the question and the place in
its group, one process and two must compute the same loss from the same global batch.
"""

import hashlib
import random
import sys

from tasks.runtime.command import main
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


if __name__ == "__main__":
    sampling.Timed = FixedTimed  # type: ignore[misc]
    sys.exit(main(grpo))
