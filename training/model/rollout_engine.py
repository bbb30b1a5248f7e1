"""vLLM inside the trainer: TRL's own, asked so that it sees exactly the trainer's tokens.

TRL hands a colocated vLLM prompts whose image tokens are expanded already, together with the image,
and vLLM expands them once more: of an image of N tokens it makes 2N - 1, and says nothing. Here it
is handed the chat template's tokens, with one for the image, and what it makes of them is compared
with the trainer's prompt every time. A server is handed processed images, which TRL puts in place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import trl.generation.vllm_generation as generation
import trl.trainer.grpo_trainer as grpo_trainer
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration

from tasks.engines.vllm import ONE_IMAGE
from tasks.runtime.errors import StageError

# What else would shape the distribution that vLLM draws from; the temperature is said each time.
PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "structured_outputs_regex": None,
}


class RolloutEngine(VLLMGeneration):
    """TRL's interface to vLLM, for prompts of one image.

    `unexpanded` maps the tokens of a prompt to those of the chat template, with one for the image;
    `never_drawn` are vLLM's sampling parameters that keep image tokens out of completions.
    """

    unexpanded: dict[tuple[int, ...], list[int]]

    def __init__(self, model: Any, *args: Any, generation_kwargs: Any = None, **kwargs: Any):
        self.unexpanded = {}
        # An image token that is drawn stands for no image, and the trainer's pass would end on it.
        self.never_drawn = {"logit_bias": {model.config.image_token_id: -100.0}}
        given = self.never_drawn | (generation_kwargs or {})
        super().__init__(model, *args, generation_kwargs=given, **kwargs)

    def _init_vllm(self) -> None:
        engine: Any = getattr(generation, "LLM", None)  # missing where vLLM is not installed
        with replaced(generation, "LLM", lambda **given: engine(**given, **ONE_IMAGE)):
            super()._init_vllm()

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple:
        """As TRL's. Raises StageError when a colocated vLLM makes other tokens of a prompt."""
        if self.mode != "colocate":
            return super().generate(prompts, images, num_generations, profiler)
        asked = [self.unexpanded.get(tuple(ids), ids) for ids in prompts]
        seen, *rest = super().generate(asked, images, num_generations, profiler)
        for ours, theirs in zip(prompts, seen, strict=True):
            if list(ours) != list(theirs):
                raise StageError(
                    f"vLLM makes {len(theirs)} tokens of a prompt of which the policy's processor "
                    f"makes {len(ours)}, so completions would answer other prompts than are trained "
                    'on; train without it ("use_vllm": false in [Train] trl)'
                )
        return (prompts, *rest)

    @contextmanager
    def decoding(self, temperature: float, max_tokens: int) -> Iterator[None]:
        """Draw at this temperature (0: greedily) and shaped by nothing else, within this."""
        changed = {
            **PLAIN,
            "temperature": temperature,
            "max_completion_length": max_tokens,
            "generation_kwargs": self.never_drawn,
        }
        kept = {name: getattr(self, name) for name in changed}
        self.__dict__.update(changed)
        try:
            yield
        finally:
            self.__dict__.update(kept)


class RolloutsByVllm(GRPOTrainer):
    """Mixed into a trainer with `use_vllm`: its rollouts come from a `RolloutEngine`."""

    vllm_generation: RolloutEngine
    _last_loaded_step: int  # whose weights vLLM has

    def __init__(self, *args: Any, **kwargs: Any):
        with replaced(grpo_trainer, "VLLMGeneration", RolloutEngine):
            super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, fields = super()._tokenize_prompts(prompts)
        self.vllm_generation.unexpanded = dict(self._unexpanded(prompts, ids))
        return ids, images, fields

    def _unexpanded(
        self, prompts: list[Any], ids: list[list[int]]
    ) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Each prompt's tokens and those of its chat template, as TRL renders it."""
        first = {tuple(own): prompt for own, prompt in zip(ids, prompts, strict=True)}
        for own, prompt in first.items():
            text = self.chat_text(prompt)
            bos = self._tokenizer.bos_token
            special = bos is None or not text.startswith(bos)  # as a processor decides it
            yield own, self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def chat_text(self, prompt: Any) -> str:
        """A prompt by the policy's chat template, as TRL renders it, ready to be answered."""
        return self.processing_class.apply_chat_template(
            prepare_multimodal_messages(prompt),
            tools=self.tools or None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=False,
            **self.chat_template_kwargs,
        )

    def ask(
        self, prompts: Sequence[Any], *, temperature: float, max_tokens: int
    ) -> tuple[list[list[int]], list[list[int]], list[list[float | None]]]:
        """One completion of each chat by vLLM with the newest weights: prompts, completions, logps.

        The three are token ids, token ids, and the log-probabilities of the latter; chats hold their
        images. Draws of the training are not moved. Every process must ask for as many at a time.
        """
        ids, images, _ = self._tokenize_prompts(list(prompts))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            if self.state.global_step != self._last_loaded_step:
                self.vllm_generation.sync_weights()
                self._last_loaded_step = self.state.global_step
            with self.vllm_generation.decoding(temperature, max_tokens):
                _, completions, logps, _ = self.vllm_generation.generate(ids, images, 1)
        return ids, completions, [[each[0] for each in own] for own in logps]


def by_vllm(kind: type[GRPOTrainer]) -> type[GRPOTrainer]:
    """A kind of trainer whose rollouts come from a `RolloutEngine`."""
    return type(kind.__name__, (RolloutsByVllm, kind), {})


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """A name of a module stands for something else within this."""
    missing = object()
    kept = getattr(module, name, missing)
    setattr(module, name, value)
    try:
        yield
    finally:
        if kept is missing:
            delattr(module, name)
        else:
            setattr(module, name, kept)
