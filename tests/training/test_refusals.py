"""Settings that cannot be are refused before training."""

import pytest

from tasks.runtime.errors import StageError
from tests.training.test_grpo import arguments, frozen, trained  # noqa: F401

pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"trl": {"use_cpu": True, "logging_steps": 5}}, "'logging_steps' is set by another key"),
        ({"trl": {"use_cpu": True, "bets": 0.1}}, "TRL has no option 'bets'; did you mean beta"),
        ({"micro_batch_size": 3}, "must be a multiple of micro_batch_size x processes = 3 x 1; set it to 2"),
        ({"micro_batch_size": 2, "dynamic_sampling": 1, "questions_per_step": 1, "num_generations": 4,
          "trl": {"use_cpu": True}}, None),
        ({"keep_policy": "best"}, "keep_policy = best needs watch_every"),
        ({"keep_policy": "worst"}, "must be last or best"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16; got 'float16'"),
        ({"order": "curriculum", "ask": "open"}, "curriculum goes by candidates"),
        ({"rewards": {"difficulty_weighted": 1.0}}, "divides away what difficulty_weighted pays"),
        ({"check_memory": True, "dtype": "bfloat16", "lora_rank": 4, "freeze": "vision"}, "lora_targets says"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_training(frozen, tmp_path, changed, why):
    if why is None:
        trained(tmp_path / "out", arguments(frozen, steps=1, **changed))
        return
    with pytest.raises(StageError, match=why):
        trained(tmp_path / "out", arguments(frozen, **changed))
