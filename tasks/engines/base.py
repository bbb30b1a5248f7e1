"""The interface of an engine, which generates text, and the helpers that engines share.

An engine answers requests (an image and a user text) with `n` completions each.
`tasks/engines/backends.py` opens the engine that `[engine] backend` names, and
`tasks/engines/pool.py` runs engines on shards, in processes or on a cluster.
"""

import asyncio
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tasks.language import prompts
from tasks.runtime.errors import StageError, first_line
from tasks.tables.pixels import Decoder


@dataclass(frozen=True)
class Request:
    """One image and one user text; `image` holds encoded bytes (JPEG or PNG).

    `before` is text before the image. All requests share it, so that an engine can cache its
    prefix. With `choices` the answer must be one of these texts. `decode` is the engine's own, see
    Engine.
    """

    key: str
    image: bytes
    text: str
    before: str = ""
    choices: tuple[str, ...] = ()
    decode: Callable[[bytes], Image.Image] = field(default=Decoder(), repr=False)

    @cached_property
    def picture(self) -> Image.Image:
        """The RGB picture, no larger than the engine's policy can use."""
        return self.decode(self.image)

    def without_bytes(self) -> "Request":
        """The same request with the decoded picture only, to free the encoded bytes."""
        picture = self.picture
        return replace(self, image=b"", decode=lambda _: picture)


@dataclass(frozen=True)
class Completion:
    """One sampled completion, raw. `mean_logprob` is in nats per token, 0.0 for an empty one."""

    text: str
    finish_reason: str
    num_tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: `temperature` 0 is greedy, `max_new_tokens` bounds the completion."""

    n: int
    temperature: float
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int


def request_seed(sampling: Sampling, request: Request) -> int:
    """The seed of a request, which does not depend on its place in the batch.

    vLLM seeds the i-th sample of a request with this seed plus i, so seeds must lie far apart.
    """
    digest = hashlib.sha256(f"{sampling.seed}/{request.key}".encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest()[:4], "big") // 2


class Engine(Protocol):
    """Answers requests in order, with `sampling.n` completions each.

    An engine may also have:
    `slots`: how many shards it takes at once, from as many threads; 1 without it.
    `counts`: totals by name, such as prompt_tokens and cached_tokens.
    `check(request)`: raises StageError when the prompt cannot be answered, and ValueError when the
    image is refused.
    `pictures`: False if it takes encoded bytes.
    `decode`: makes a picture of encoded bytes. Without it pictures come at full size; with it a
    request may come as `Request.without_bytes()`.
    `opening`: a tag that the policy's chat template wrote and that belongs to each completion.
    `constrained`: True if its answers keep to `Request.choices`.
    `close()`: frees its memory and processes.
    """

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]]: ...


class EngineDied(Exception):
    """The engine cannot go on and its process has to end. No request is at fault."""


class EventLoopThread:
    """An asyncio event loop in a thread of its own, which other threads submit coroutines to."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the loop, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def all_of(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results of all coroutines. Raises the first error, but only after all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@contextmanager
def quiet_start() -> Iterator[None]:
    """Hide what a library prints while it starts, and show the end of it if the start fails.

    Some libraries print from C, so the file descriptors themselves are redirected.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 1)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            size = os.fstat(aside.fileno()).st_size
            os.write(kept[1], os.pread(aside.fileno(), 4000, max(0, size - 4000)))
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def load_processor(policy: Path | str, **options: Any) -> Any:
    """A policy's processor, from a folder or the hub.

    Raises StageError when a package that the processor needs is missing.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(policy, **options)
    except ImportError as error:
        raise StageError(
            f"the processor of {policy} cannot be loaded: {first_line(error)}"
        ) from error


def bounded(max_pixels: int) -> dict[str, int]:
    """A processor's option that bounds an image's area; none for 0."""
    return {"max_pixels": max_pixels} if max_pixels else {}


class PromptBuilder:
    """Turns requests into prompt strings and token ids, by the policy's own chat template.

    `max_pixels` above 0 replaces the processor's upper bound of an image's area. Raises StageError when
    the policy has no chat template, or one that drops the image, or no such bound.
    """

    def __init__(self, policy: Path, max_model_len: int = 0, max_pixels: int = 0):
        self.policy = policy
        self.max_model_len = max_model_len
        self.processor = load_processor(policy, **bounded(max_pixels))
        size = getattr(self.processor.image_processor, "size", None) or {}
        if max_pixels and size.get("longest_edge") != max_pixels:
            raise StageError(
                f"[engine] max_pixels = {max_pixels} does nothing, because {policy} has an image size "
                "of its own; set it to 0"
            )
        self.decode = Decoder(self.processor)
        try:
            rendered = self.render("probe")
        except (ValueError, TypeError, AttributeError) as error:
            raise StageError(f"{policy} has no chat template for images: {error}") from error
        self.placeholder = getattr(self.processor, "image_token", None)
        if self.placeholder and rendered.count(self.placeholder) != 1:
            raise StageError(
                f"the chat template of {policy} puts {rendered.count(self.placeholder)} image "
                f"placeholders ({self.placeholder}) into a prompt with one image; use a "
                "vision-language chat model"
            )
        self.opening = prompts.opening(self.processor)

    def __call__(self, request: Request) -> str:
        return self.render(request.text, request.before)

    def render(self, text: str, before: str = "") -> str:
        """The prompt string with one image placeholder."""
        return prompts.rendered(self.processor, prompts.chat(text, before))

    def tokens(self, request: Request) -> list[int]:
        """The prompt's token ids, image tokens included, made as TRL's trainer makes them."""
        messages = prompts.chat(request.text, request.before)
        for part in messages[0]["content"]:
            if part["type"] == "image":
                part["image"] = request.picture
        encoded = self.processor.apply_chat_template(
            [messages], tokenize=True, add_generation_prompt=True, return_dict=True
        )
        return [int(token) for token in encoded["input_ids"][0]]

    def spelling(self, choice: str) -> tuple[str, list[int]]:
        """A choice as the tokenizer decodes it alone, many with a leading space, and its tokens."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer.encode(choice, add_special_tokens=False)
        spaced = tokenizer.convert_ids_to_tokens(ids)[0][0] in "\u0120\u2581"
        return f" {choice}" if spaced else choice, ids

    def tokens_that_fit(self, request: Request, max_new_tokens: int) -> list[int]:
        """The prompt's tokens. Raises StageError when they and the answer exceed max_model_len."""
        tokens = self.tokens(request)
        count = len(tokens)
        if self.max_model_len and count + max_new_tokens > self.max_model_len:
            raise StageError(
                f"the longest prompt has {count} tokens ({request.key}), and with [engine] "
                f"max_new_tokens = {max_new_tokens} needs {count + max_new_tokens}; [engine] "
                f"max_model_len is {self.max_model_len}: raise it, or give smaller images ([engine] or [BasePolicy] max_pixels, where the model scales by it)"
            )
        return tokens


def rollout_row(image_id: str, rollout: int, completion: Completion) -> dict[str, Any]:
    """A completion as a row of the rollouts table."""
    row = asdict(completion)
    text = valid_utf8(row.pop("text"))
    return {"image_id": image_id, "rollout": rollout, "completion": text, **row}


def valid_utf8(text: str) -> str:
    """The text with lone surrogates, which JSON can carry but UTF-8 cannot, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
