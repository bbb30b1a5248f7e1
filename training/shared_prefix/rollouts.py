"""Rollouts by transformers for which each prompt and image goes through the model once a group.

The base class of `training.shared_prefix.groups`. TRL pads prompts, casts weights, calls `generate`,
and cuts completions after their ends. Here it does so for one prompt a group, and
`tasks.engines.shared_prompts` takes the place of `generate`. Without vLLM generation takes most of a
training step's time.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tasks.engines.shared_prompts.cache import NotShared
from tasks.engines.shared_prompts.generation import SharedPrompts
from training.model.grpo_trainer import GRPOTrainer
from training.shared_prefix.forward import base_of
from training.shared_prefix.packing import Counters
from training.shared_prefix.prompts_once import PromptsOnce


class RolloutsOnce(GRPOTrainer):
    """GRPOTrainer that processes each prompt once a group, and generates from one copy of it.

    With `check_first_batch` the first batch's log-probabilities are checked, and another generation is
    TRL's own if they differ. So it is where weights are sharded: their layers meet at every token,
    and each process would stop at its own.
    """

    processing_class: Any

    def __init__(self, *args: Any, check_first_batch: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counters = Counters()
        self._prompts: PromptsOnce | None = None  # of the training batch that is being generated
        self._tokenized: PromptsOnce | None = None  # of the prompts that come next
        self._shared = SharedPrompts(
            base_of(self.model),
            lambda line: print(f"train: {line}", flush=True),
            check=check_first_batch,
            mixed=self.accelerator.mixed_precision != "no",
        )

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """Generates with the trained model; None where its weights are sharded."""
        return None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self._shared

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        once = self._prompts
        if once is None:  # not for a training batch
            pairs = itertools.pairwise(prompts)
            runs = list(itertools.accumulate((a is not b for a, b in pairs), initial=0))
            once = PromptsOnce(self.processing_class, runs, per_group=False)
        ids, images = once.tokenize(prompts, super()._tokenize_prompts)
        self.counters.image_processor_calls += once.calls
        self.counters.unique_images += once.unique_images
        self._tokenized = once
        return ids, images, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, *arguments: Any, **named: Any
    ) -> Any:
        once, generate = self._tokenized, super()._generate_single_turn
        if self.use_vllm or once is None:
            return generate(prompt_ids, images, fields, *arguments, **named)
        shared = self.shared_prompts
        if shared and not shared.why_not and not self.use_transformers_continuous_batching:
            first = [prompt_ids[rows[0]] for rows in once.rows.values()]
            try:
                with self._one_prompt_a_group(shared, once.group_of):
                    return generate(first, None, once.by_group(), *arguments, **named)
            except NotShared:  # which has been printed
                pass
        return generate(prompt_ids, images, once.by_row(), *arguments, **named)

    @contextmanager
    def _one_prompt_a_group(self, shared: SharedPrompts, group_of: Sequence[int]) -> Iterator[None]:
        """Within this, the model's `generate` takes one prompt a group, and returns a row for each row.

        Rows are without dropout, as are those of vLLM. Raises NotShared.
        """
        base, training = base_of(self.model), self.model.training

        def generate(generation_config: Any, **inputs: Any) -> torch.Tensor:
            made = shared.generate(inputs, group_of, generation_config=generation_config)
            if made is None:
                raise NotShared(shared.why_not)
            return made.sequences

        base.generate = generate
        self.model.eval()
        try:
            yield
        finally:
            del base.generate
            self.model.train(training)
