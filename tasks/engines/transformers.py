"""The transformers engine: slower than vLLM, but for every architecture.

It runs the model code that training runs, so it is the cross-check for the other backends. An image
and its prompt go through the model once for all samples, where the architecture allows it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.engines.base import Completion, EngineDied, PromptBuilder, Request, Sampling
from tasks.engines.settings import EngineSettings
from tasks.engines.shared_prompts.cache import NotShared
from tasks.engines.shared_prompts.generation import SharedPrompts
from tasks.runtime.errors import StageError

BATCH = 32  # images in a batch, where memory allows
MEMORY = 2 << 30  # bytes that a batch's samples may take, beside weights and prompts


class TransformersEngine:
    """Samples of BATCH images at a time, by shared prompts or by `generate`."""

    slots = 1
    constrained = True

    def __init__(self, policy: Path, settings: EngineSettings):
        import torch
        from transformers import AutoModelForImageTextToText

        self._torch = torch
        self.prompt_builder = PromptBuilder(policy, settings.max_model_len, settings.max_pixels)
        self.decode, self.opening = self.prompt_builder.decode, self.prompt_builder.opening
        self._settings = settings
        self.counts: Counter[str] = Counter()
        self._processor = self.prompt_builder.processor
        self._processor.tokenizer.padding_side = "left"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else "auto"
        self._model = AutoModelForImageTextToText.from_pretrained(
            policy, dtype=dtype, use_safetensors=True
        )
        self._model.to(device).eval()
        self._shared = SharedPrompts(self._model, lambda line: print(line, flush=True))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Completions in the order of the requests."""
        if any(request.choices for request in requests):
            return [
                answer
                for start in range(0, len(requests), BATCH)
                for answer in self._choose(requests[start : start + BATCH])
            ]
        self._torch.manual_seed(sampling.seed)
        answers: list[list[Completion]] = []
        try:
            while len(answers) < len(requests):
                room = max(1, MEMORY // self._bytes(sampling.max_new_tokens))
                size = max(1, min(BATCH, room // sampling.n))
                part = requests[len(answers) : len(answers) + size]
                at_once = [min(room, sampling.n - done) for done in range(0, sampling.n, room)]
                try:
                    rounds = [self._batch(part, replace(sampling, n=n)) for n in at_once]
                except NotShared:  # before anything is sampled: again, where less fits at once
                    continue
                answers += [[c for row in rows for c in row] for rows in zip(*rounds, strict=True)]
        except self._torch.OutOfMemoryError as error:
            raise EngineDied(f"out of memory: {error}") from error
        return answers

    def check(self, request: Request) -> None:
        """Check that the longest prompt fits."""
        self.prompt_builder.tokens_that_fit(request, self._settings.max_new_tokens)

    def _inputs(self, requests: Sequence[Request]) -> Any:
        inputs = self._processor(
            text=[self.prompt_builder(request) for request in requests],
            images=[[request.picture] for request in requests],
            padding=True,
            return_tensors="pt",
        ).to(self._model.device)
        self.counts["prompt_tokens"] += int(inputs["attention_mask"].sum())
        return inputs

    def _choose(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """For each request, the choice that is likeliest as the first token."""
        output = self._model.generate(
            **self._inputs(requests),
            do_sample=False,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        completions = []
        for request, row in zip(requests, output.logits[0].float().cpu(), strict=True):
            tokens = [self._token_of(choice) for choice in request.choices]
            logprobs = row[tokens].log_softmax(-1)  # over the choices, all other tokens masked
            best = int(logprobs.argmax())
            completions.append(
                [Completion(request.choices[best], "stop", 1, float(logprobs[best]))]
            )
        return completions

    def _token_of(self, choice: str) -> int:
        """The single token of `choice`. Raises StageError when it has several."""
        _, tokens = self.prompt_builder.spelling(choice)
        if len(tokens) != 1:
            raise StageError(
                f"{self.prompt_builder.policy} spells {choice!r} in {len(tokens)} tokens; backend transformers "
                "keeps an answer to given letters only where each is one token: use backend vllm"
            )
        return tokens[0]

    def _bytes(self, longest: int) -> int:
        """Bytes that a sample of up to `longest` tokens takes: its keys and values, and logits."""
        text = self._model.config.get_text_config()
        vocabulary: int = self._model.get_output_embeddings().weight.shape[0]
        if self._shared.why_not:  # `generate` keeps the logits of every token, for `logprobs`
            return 8 * vocabulary * longest
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        keys: int = 2 * text.num_hidden_layers * heads * size * self._model.dtype.itemsize
        return keys * longest + 24 * vocabulary

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Samples of each request. Raises NotShared when prompts turn out not to be shareable."""
        inputs = self._inputs(requests)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
            options["top_p"] = sampling.top_p
        options["repetition_penalty"] = sampling.repetition_penalty
        options["max_new_tokens"] = sampling.max_new_tokens
        if self._shared.why_not:
            sequences, logprobs = self._by_generate(inputs, sampling.n, options)
        else:
            prompts = [row for row in range(len(requests)) for _ in range(sampling.n)]
            made = self._shared.generate(dict(inputs), prompts, logprobs=True, **options)
            if made is None:
                self.counts["prompt_tokens"] -= int(inputs["attention_mask"].sum())
                raise NotShared(self._shared.why_not)
            sequences, logprobs = made.sequences, made.logprobs
        tokens = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        flat = [
            self._completion(row, values, ends)
            for row, values in zip(tokens, logprobs.tolist(), strict=True)
        ]
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]

    def _by_generate(self, inputs: Any, n: int, options: dict[str, Any]) -> tuple[Any, Any]:
        """Token ids (rows, prompt and tokens) and log-probabilities (rows, tokens)."""
        output = self._model.generate(
            **inputs,
            **options,
            num_return_sequences=n,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :, None]
        logits = self._torch.stack(output.logits, 1).float()
        return output.sequences, logits.log_softmax(-1).gather(-1, tokens)[..., 0]

    def _completion(self, ids: list[int], logprobs: list[float], ends: set[int]) -> Completion:
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        stopped = length > 0 and ids[length - 1] in ends
        text = self._processor.tokenizer.decode(ids[:length], skip_special_tokens=True)
        mean = sum(logprobs[:length]) / length if length else 0.0
        return Completion(text, "stop" if stopped else "length", length, mean)
