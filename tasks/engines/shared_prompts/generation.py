"""Generates completions with each prompt going through the model once, however many it gets.

`generate` of transformers copies a prompt before its first pass. So an image is encoded and a prompt
computed once for each completion, and every copy's keys and values are stored, and read at each token.
Here all completions of a prompt attend to one copy, by one matrix product, and completions that have
ended leave the batch.

`decode` takes the place of `generate`'s own loop. Inputs, positions, the cache, processors of logits
and criteria for stopping come from `generate`, so all its options mean the same. `SharedPrompts`
checks a model's first batch. Where a model or an option needs transformers' loop, it says so.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.engines.shared_prompts.cache import NAME, Branches, NotShared, attend, share

if TYPE_CHECKING:
    import torch

PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
COMPACT = 8  # the batch is compacted once an eighth of its rows have ended
CHECKED = 16  # tokens of a completion that are checked
EXACT, ROUGH = 1e-4, 5e-2  # nats a token by which two passes may differ: in float32, in 16 bits
# What a model that does not go with this raises, beside NotShared.
UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError)


@dataclass
class Generated:
    """Completions, padded after their ends.

    `sequences` (rows, prompt and completion) are token ids. `logprobs` (rows, completion) are the
    model's own, in nats, before temperature and other processors, and 0 after the end; None unless
    they were asked for.
    """

    sequences: "torch.Tensor"
    logprobs: "torch.Tensor | None"


class SharedPrompts:
    """Generates with `model` by shared prompts, unless `why_not` says why it needs its own loop.

    With `check` the first batch's log-probabilities are compared with those of a plain forward pass,
    exactly so if all is computed in float32: `mixed` says that weights in float32 are rounded for it.
    """

    def __init__(
        self, model: Any, say: Callable[[str], Any], *, check: bool = True, mixed: bool = False
    ):
        self.model, self._generate, self.why_not = model, model.generate, ""
        self._say, self._unchecked, self._mixed = say, check, mixed

    def generate(
        self,
        inputs: dict[str, Any],
        prompts: Sequence[int],
        logprobs: bool = False,
        **options: Any,
    ) -> Generated | None:
        """One completion for each of `prompts`, the number of a row in `inputs`, which never falls.

        `inputs` are the model's, padded on the left; `options` are those of transformers' `generate`.
        Returns None, and says so once, where that has to be called instead.
        """
        import torch

        if self.why_not:
            return None
        options = {**with_dynamic_cache(options), "custom_generate": decode, "prompts": prompts}
        if not self._unchecked:
            return self._generate(**inputs, **options, logprobs=logprobs)  # type: ignore[no-any-return]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        before = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
        try:
            generated: Generated = self._generate(**inputs, **options, logprobs=True)
            self._check(inputs, prompts, generated)
        except (NotShared, RuntimeError, *UNFIT) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.why_not = str(error).strip().split("\n")[0] or type(error).__name__
        if self.why_not:
            torch.set_rng_state(before[0])
            for device, state in zip(devices, before[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            kind = self.model.config.model_type
            self._say(
                f"each completion generates with a prompt of its own ({kind}: {self.why_not})"
            )
            return None
        self._unchecked = False
        return generated

    def _check(self, inputs: dict[str, Any], prompts: Sequence[int], generated: Generated) -> None:
        """Compare the first tokens of a completion of each prompt with a plain forward pass."""
        import torch

        assert generated.logprobs is not None
        first = [row for row in range(len(prompts)) if not row or prompts[row] != prompts[row - 1]]
        width = inputs["input_ids"].size(1)
        tokens = generated.sequences[first, width : width + CHECKED]
        ours = generated.logprobs[first, : tokens.size(1)]
        # A token of an image has no image; what follows it is not compared.
        compared = (ours != 0) & ~torch.isin(tokens, image_tokens(self.model)).cumsum(1).bool()
        tokens = tokens.where(compared, 0)
        whole = dict(inputs)
        for name in ("input_ids", *PER_TOKEN):
            if name in inputs:
                new = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                added = new.get(name, torch.zeros_like(tokens))
                whole[name] = torch.cat([inputs[name], added], 1)
        last = tokens.size(1) + 1
        if self.model._supports_logits_to_keep():
            whole["logits_to_keep"] = last
        with torch.no_grad():
            logits = self.model(**whole, use_cache=False, return_dict=True).logits
        theirs = logits[:, -last:-1].float().log_softmax(-1)
        theirs = theirs.gather(-1, tokens[..., None])[..., 0]
        apart = (ours - theirs).abs()[compared]
        mean = float(apart.sum()) / max(1, len(apart))
        exact = not self._mixed and torch.get_float32_matmul_precision() == "highest"
        exact = exact and all(p.dtype == torch.float32 for p in self.model.parameters())
        if not mean <= (EXACT if exact else ROUGH):
            raise NotShared(f"log-probabilities differ by {mean:.1e} nats a token")


def decode(
    model: Any,
    input_ids: "torch.Tensor",
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    prompts: Sequence[int] = (),
    logprobs: bool = False,
    **inputs: Any,
) -> Generated:
    """The loop that `generate` calls as its `custom_generate`. Raises NotShared."""
    import torch

    check_options(generation_config)
    device, width, longest = input_ids.device, input_ids.size(1), generation_config.max_length
    prompt = torch.tensor(prompts, device=device)
    branches = Branches(prompt, len(input_ids))
    outputs = model._prefill(input_ids, generation_config, inputs)
    cache = share(outputs.past_key_values, branches, inputs["attention_mask"])
    inputs = model._update_model_kwargs_for_generation(outputs, inputs)
    inputs = {
        # Of a mask all is needed, of the others the last token's, which the next one's continue.
        name: value[..., -1:] if name in PER_TOKEN[1:] and value is not None else value
        for name, value in inputs.items()
        if name in PER_TOKEN or not isinstance(value, torch.Tensor)
    }
    inputs = by_row(inputs, prompt)
    logits = outputs.logits[:, -1].float()[prompt]
    del outputs
    pad = generation_config._pad_token_tensor
    pad = input_ids.new_zeros(()) if pad is None else pad.to(device)
    ids = pad.expand(len(prompt), longest).clone()
    ids[:, :width] = input_ids[prompt]
    sequences = ids.clone()
    scores = logits.new_zeros(len(prompt), longest - width) if logprobs else None
    rows = torch.arange(len(prompt), device=device)  # where the batch's rows lie in `sequences`
    going = torch.ones_like(rows, dtype=torch.bool)
    choose = Sampler(logits) if generation_config.do_sample else greedy
    at = width
    with shared_attention(model), model._optimize_model_for_decode():
        while True:
            tokens = choose(logits_processor(ids[:, :at], logits))
            tokens = torch.where(going, tokens, pad)
            ids[:, at] = tokens
            sequences[rows, at] = tokens
            if scores is not None:
                own = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                scores[rows, at - width] = torch.where(going, own, 0.0)
            at += 1
            going = going & ~stopping_criteria(ids[:, :at], None)
            left = int(going.sum())
            if not left:
                scores = None if scores is None else scores[:, : at - width]
                return Generated(sequences[:, :at], scores)
            if (len(rows) - left) * COMPACT >= len(rows):
                kept = going.nonzero()[:, 0]
                rows, ids, going, inputs = rows[kept], ids[kept], going[kept], by_row(inputs, kept)
                branches.keep(kept, cache)
            step = model.prepare_inputs_for_generation(
                ids[:, :at], next_sequence_length=1, **inputs
            )
            outputs = model(**step, return_dict=True)
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            logits = outputs.logits[:, -1].float()


def with_dynamic_cache(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` with a dynamic cache, unless they name another kind themselves.

    A model's own options may name a static cache, as those of Gemma 3 do, which changes no token.
    """
    config = copy.copy(options.get("generation_config"))
    if config is None:
        return {"cache_implementation": "dynamic", **options}
    config.cache_implementation = config.cache_implementation or "dynamic"
    return {**options, "generation_config": config}


def check_options(config: Any) -> None:
    """Raise NotShared for options that `decode` does not know."""
    from transformers.generation import GenerationMode

    if config.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise NotShared(f"{config.get_generation_mode().value} is not sampling")
    if config.num_return_sequences != 1 or not config.use_cache:
        raise NotShared("num_return_sequences or use_cache is set")
    for name in (
        "guidance_scale",
        "prefill_chunk_size",
        "watermarking_config",
    ):
        if getattr(config, name, None) is not None:
            raise NotShared(f"the option {name} is set")


def image_tokens(model: Any) -> "torch.Tensor":
    """The ids of tokens that stand for images and videos, as the model's config names them."""
    import torch

    config = model.config.to_dict().items()
    ids = [v for name, v in config if "image_token" in name or "video_token" in name]
    return torch.tensor([v for v in ids if isinstance(v, int)], device=model.device)


def by_row(inputs: dict[str, Any], rows: "torch.Tensor") -> dict[str, Any]:
    """These rows of the inputs that have a value for each token; the others stay."""
    return {
        name: value.index_select(-2, rows) if name in PER_TOKEN and value is not None else value
        for name, value in inputs.items()
    }


@contextmanager
def shared_attention(model: Any) -> Iterator[None]:
    """Within this, the language model attends by `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config = model.config.get_text_config(decoder=True)
    kept = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = kept


def greedy(scores: "torch.Tensor") -> "torch.Tensor":
    """The likeliest token of each row (rows,)."""
    return scores.argmax(-1)


class Sampler:
    """Draws a token of each row (rows,) from scores (rows, vocabulary), one random number a row.

    `torch.multinomial` draws a random number for each token of the vocabulary, which takes as long as
    a small model's whole pass. Raises RuntimeError where a probability is not a number.
    """

    def __init__(self, like: "torch.Tensor"):
        import torch

        self._torch = torch
        # Sums in float32 would lose tokens whose probability is below its precision.
        self._sums = torch.empty(like.shape, dtype=torch.float64, device=like.device)

    def __call__(self, scores: "torch.Tensor") -> "torch.Tensor":
        torch = self._torch
        sums = self._sums[: len(scores)]
        torch.cumsum(scores.softmax(-1), -1, dtype=torch.float64, out=sums)
        drawn = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        # Below the last sum also after rounding, so that no token without probability is drawn.
        tokens = torch.searchsorted(sums, drawn.clamp_(max=1 - 2**-52) * sums[:, -1:], right=True)
        if int(tokens.max()) >= scores.size(1):
            raise RuntimeError("the model's probabilities are not numbers (nan or inf)")
        return tokens[:, 0]
