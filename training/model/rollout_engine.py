"""TRL's vLLM inside the trainer, with prompts that have exactly the trainer's tokens.

TRL passes a colocated vLLM the image and a prompt whose image tokens are already expanded. vLLM then
silently expands them again: an image of N tokens gets 2N - 1. The engine here passes the chat
template's tokens, with one image token, and compares vLLM's expanded prompt with the trainer's at
every call. A vLLM server needs no change, since TRL sends it processed images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl.data_utils import prepare_multimodal_messages

from tasks.engines.vllm import ONE_IMAGE
from tasks.runtime.errors import StageError
from training.model.grpo_trainer import GRPOTrainer, generation, import_vllm, replaced, trainer

# Sampling options that leave the distribution unchanged; the temperature is passed at each call.
PLAIN = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "structured_outputs_regex": None,
}


class RolloutEngine(generation.VLLMGeneration):
    """TRL's interface to vLLM, for prompts with one image.

    `unexpanded` maps a prompt's tokens to the chat template's, which have one image token.
    `never_drawn` are vLLM's sampling parameters that keep image tokens out of completions.
    """

    unexpanded: dict[tuple[int, ...], list[int]]

    def __init__(self, model: Any, *args: Any, generation_kwargs: Any = None, **kwargs: Any):
        self.unexpanded = {}
        # The trainer's forward pass would fail on a sampled image token, which has no image.
        self.never_drawn = {"logit_bias": {model.config.image_token_id: -100.0}}
        options = self.never_drawn | (generation_kwargs or {})
        super().__init__(model, *args, generation_kwargs=options, **kwargs)

    def _init_vllm(self) -> None:
        engine: Any = getattr(generation, "LLM", None)  # missing where vLLM is not installed
        with replaced(generation, "LLM", lambda **options: engine(**options, **ONE_IMAGE)):
            super()._init_vllm()

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple:
        """As TRL's. Raises StageError when a colocated vLLM expands a prompt to other tokens."""
        if self.mode != "colocate":
            return super().generate(prompts, images, num_generations, profiler)
        short = [self.unexpanded.get(tuple(ids), ids) for ids in prompts]
        expanded, *rest = super().generate(short, images, num_generations, profiler)
        for ours, theirs in zip(prompts, expanded, strict=True):
            if list(ours) != list(theirs):
                raise StageError(
                    f"vLLM makes {len(theirs)} tokens of a prompt of which the policy's processor "
                    f"makes {len(ours)}, so completions would answer other prompts than are trained "
                    'on; train without it ("use_vllm": false in [Train] trl)'
                )
        return (prompts, *rest)

    @contextmanager
    def decoding(self, temperature: float, max_tokens: int) -> Iterator[None]:
        """Within this, sample at `temperature` (0: greedily), with no other sampling option."""
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
    """Mixin for a trainer with `use_vllm`, whose rollouts come from a `RolloutEngine`."""

    vllm_generation: RolloutEngine
    _last_loaded_step: int  # the step whose weights vLLM has

    def __init__(self, *args: Any, **kwargs: Any):
        with replaced(trainer, "VLLMGeneration", RolloutEngine):
            super().__init__(*args, **kwargs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, fields = super()._tokenize_prompts(prompts)
        self.vllm_generation.unexpanded = dict(self._unexpanded(prompts, ids))
        return ids, images, fields

    def _unexpanded(
        self, prompts: list[Any], ids: list[list[int]]
    ) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Pairs of each distinct prompt's tokens and its chat template's, as TRL renders it."""
        first = {tuple(own): prompt for own, prompt in zip(ids, prompts, strict=True)}
        for own, prompt in first.items():
            text = self.chat_text(prompt)
            bos = self._tokenizer.bos_token
            special = bos is None or not text.startswith(bos)  # the same rule as in a processor
            yield own, self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def chat_text(self, prompt: Any) -> str:
        """A prompt rendered by the policy's chat template, as TRL does it, up to the answer."""
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
        """One completion of each chat, sampled by vLLM with the newest weights.

        `prompts` are chats with their images. Returns the prompts' token ids, the completions' token
        ids, and the latter's log-probabilities. The training's random generators stay as they are.
        Every process must call it with equally many chats.
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
    """The trainer class `kind` with rollouts from a `RolloutEngine`."""
    import_vllm()
    return type(kind.__name__, (RolloutsByVllm, kind), {})
