"""The server engine: sends requests to an OpenAI-compatible endpoint, such as `vllm serve`.

Many requests are in flight at once, and failed ones are retried. Images travel in the requests, so
the server needs no access to the pipeline's files. The server's own limits (context length, pixels)
apply.
"""

import asyncio
import base64
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.engines.base import (
    Completion,
    EngineDied,
    EventLoopThread,
    PromptBuilder,
    Request,
    Sampling,
    all_of,
    bounded,
    request_seed,
)
from tasks.engines.settings import EngineSettings
from tasks.language import prompts
from tasks.runtime.errors import StageError, first_line

OPTION = "option"  # the JSON key of an answer that a schema restricts to the choices
ATTEMPTS = 6  # tries of one request; the client waits between them with exponential backoff
# A server that restarts, or a proxy before it, is away for minutes: seconds to wait for it, and between
# two tries.
PATIENCE, PAUSE = 300.0, 5.0
AWAY = (502, 503, 504)  # a proxy's answers while the server behind it does not answer


class ServerEngine:
    """Sends requests to `[engine] server_url`, up to `server_concurrency` at a time.

    It takes the API key from OPENAI_API_KEY; a server of your own needs none. Raises StageError when
    no server answers there, or when it does not serve the model.
    """

    slots = 2
    pictures = False
    constrained = True

    def __init__(self, policy: Path, settings: EngineSettings):
        from openai import AsyncOpenAI

        self._policy, self._settings = policy, settings
        known = (policy / "config.json").is_file()
        self.opening = PromptBuilder(policy).opening if known else ""
        self.counts: Counter[str] = Counter()
        self._is_vllm = False
        self._told: dict[str, float] = {}  # reason -> when it was told, of a monotonic clock
        self._model = settings.server_model or str(policy)
        self._loop_thread = EventLoopThread()
        self._key = os.environ.get("OPENAI_API_KEY", "")
        self._client = AsyncOpenAI(
            base_url=settings.server_url,
            api_key=self._key or "none",
            timeout=settings.server_timeout,
            max_retries=ATTEMPTS - 1,
        )
        self._free = asyncio.Semaphore(settings.server_concurrency)
        try:
            self._loop_thread.run(self._check_model())
        except BaseException:
            self.close()
            raise

    async def _check_model(self) -> None:
        import openai

        url = self._settings.server_url
        try:
            served = {model.id: model async for model in self._client.models.list()}
        except openai.OpenAIError as error:
            raise StageError(
                f"nobody answers at [engine] server_url = {url} ({first_line(error, self._key)}); start one, such as: "
                f"vllm serve {self._model}"
            ) from error
        if self._model not in served:
            raise StageError(
                f"{url} does not serve {self._model!r} but {', '.join(served) or 'nothing'}; set "
                "[engine] server_model"
            )
        model = served[self._model]
        self._is_vllm = model.owned_by == "vllm"
        if self._settings.max_pixels and not self._is_vllm:
            raise StageError(
                f"[engine] max_pixels cannot be sent to {url}, which is not vLLM's server; set it to 0"
            )
        root = getattr(model, "root", None)
        # An artifact's folder is named by its fingerprint, so comparing names is enough.
        if (
            root
            and self._policy.is_dir()
            and Path(root).resolve().name != self._policy.resolve().name
        ):
            raise StageError(
                f"{url} serves {root}, but the policy to ask is {self._policy}; serve that folder (of an "
                "adapter, what training.export makes of it, under the same name) and run again"
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Completions in the order of the requests.

        Raises EngineDied when the server cannot be reached any more, and ValueError when it
        refuses a request.
        """

        async def every() -> list[list[Completion]]:
            return await all_of(self._one(request, sampling) for request in requests)

        return self._loop_thread.run(every())

    async def _one(self, request: Request, sampling: Sampling) -> list[Completion]:
        import openai

        # Left out, vLLM would take these from the policy's generation_config.json.
        own: dict[str, Any] = {
            "repetition_penalty": sampling.repetition_penalty,
            "top_k": 0,
            "min_p": 0.0,
        }
        if self._settings.max_pixels:
            own["mm_processor_kwargs"] = bounded(self._settings.max_pixels)
        extra = own if self._is_vllm else {}
        extra |= self._constraint(request.choices) if request.choices else {}
        # vLLM on a CPU cannot seed a request.
        seeded = self._settings.seeds == "request"
        seed = {"seed": request_seed(sampling, request)} if seeded else {}
        async with self._free:
            try:
                answer = await self._patiently(
                    model=self._model,
                    messages=_messages(request),
                    n=sampling.n,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    logprobs=True,
                    extra_body=extra,
                    **seed,
                )
            except openai.APIStatusError as error:
                if error.status_code in (400, 413, 422):
                    raise ValueError(first_line(error, self._key)) from error
                if error.status_code in (401, 403, 404):
                    raise StageError(
                        f"the server will not answer: {first_line(error, self._key)}"
                    ) from error
                raise EngineDied(f"the server gave up: {first_line(error, self._key)}") from error
            except openai.OpenAIError as error:
                raise EngineDied(f"the server gave up: {first_line(error, self._key)}") from error
        if answer.usage:
            self.counts["prompt_tokens"] += answer.usage.prompt_tokens
            details = answer.usage.prompt_tokens_details
            self.counts["cached_tokens"] += (details.cached_tokens or 0) if details else 0
        completions = [_completion(choice) for choice in answer.choices]
        if request.choices and not self._is_vllm:
            completions = [replace(each, text=_unwrapped(each.text)) for each in completions]
        return completions

    async def _patiently(self, **asked: Any) -> Any:
        """The server's answer, for which it may be away for PATIENCE seconds after the client's own tries."""
        import openai

        since = time.monotonic()
        while True:
            try:
                return await self._client.chat.completions.create(**asked)
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                status = getattr(error, "status_code", None)
                timed_out = isinstance(error, openai.APITimeoutError)
                is_away = status in AWAY or (status is None and not timed_out)
                if not is_away or time.monotonic() - since > PATIENCE:
                    raise
                self._tell_away(first_line(error, self._key))
                await asyncio.sleep(PAUSE)

    def _tell_away(self, reason: str) -> None:
        """Print that the server is away, once a minute for all requests."""
        if time.monotonic() - self._told.get(reason, -60.0) >= 60:
            self._told[reason] = time.monotonic()
            waits = f"waiting up to {PATIENCE / 60:.0f} minutes for it"
            print(f"the server does not answer ({reason}); {waits}", file=sys.stderr, flush=True)

    def _constraint(self, choices: tuple[str, ...]) -> dict[str, Any]:
        """The fields that restrict an answer to `choices`: vLLM's own, elsewhere a JSON schema."""
        if self._is_vllm:
            return {"structured_outputs": {"choice": list(choices)}}
        schema = {
            "type": "object",
            "properties": {OPTION: {"type": "string", "enum": list(choices)}},
            "required": [OPTION],
            "additionalProperties": False,
        }
        named = {"name": OPTION, "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    def check(self, request: Request) -> None:
        """Check that the longest prompt fits, and that server and processor count the same tokens.

        A server with other pixel limits or another chat template would send the policy other prompts
        than those it was trained on. The count is compared where the policy is a folder.
        """
        before = self.counts["prompt_tokens"]
        sampling = Sampling(1, 0.0, 1.0, 1.0, self._settings.max_new_tokens, 0)
        try:
            self.generate([request], sampling)
        except ValueError as error:
            if (self._policy / "config.json").is_file():
                PromptBuilder(self._policy).tokens(request)  # raises ValueError for the image alone
            raise StageError(
                f"the server refuses the longest prompt ({request.key}): {error}"
            ) from error
        theirs = self.counts["prompt_tokens"] - before
        if not (self._policy / "config.json").is_file() or not theirs:
            return
        ours = len(
            PromptBuilder(self._policy, max_pixels=self._settings.max_pixels).tokens(request)
        )
        if theirs != ours:
            raise StageError(
                f"the server makes {theirs} tokens of a prompt of which the processor of "
                f"{self._policy} makes {ours}; serve that very folder, without --mm-processor-kwargs "
                "and with its own chat template"
            )

    def close(self) -> None:
        """Close the connections."""
        self._loop_thread.run(self._client.close())
        self._loop_thread.close()


def _messages(request: Request) -> list[dict[str, Any]]:
    kind = "png" if request.image.startswith(b"\x89PNG") else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(request.image).decode()}"
    (message,) = prompts.chat(request.text, request.before)
    parts = [
        {"type": "image_url", "image_url": {"url": url}} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return [{"role": "user", "content": parts}]


def _completion(choice: Any) -> Completion:
    logprobs = (
        [token.logprob for token in (choice.logprobs.content or ())] if choice.logprobs else []
    )
    mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
    text = choice.message.content or ""
    return Completion(text, choice.finish_reason or "unknown", len(logprobs), mean)


def _unwrapped(text: str) -> str:
    """The choice in an answer of the JSON schema; the text itself when it is no such JSON."""
    try:
        return str(json.loads(text)[OPTION])
    except (ValueError, TypeError, KeyError):
        return text
