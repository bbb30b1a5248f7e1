"""Who generates text: one small interface, and the only place that imports vLLM.

An engine answers requests (an image and a user text) with `n` completions each. `vllm` is the
offline engine; `transformers` is the slow cross-check for models that vLLM does not support; a
`module:function` names your own, called with (policy, settings).
"""

import importlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from tasks import prompts
from tasks.run import StageError


@dataclass(frozen=True)
class Request:
    """One image and one user text; `image` holds encoded bytes (JPEG or PNG)."""

    key: str
    image: bytes
    text: str


@dataclass(frozen=True)
class Completion:
    """One sampled response, raw. `mean_logprob` is in nats per token, 0.0 for an empty one."""

    text: str
    finish_reason: str
    num_tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Sampling:
    """How to sample: `temperature` 0 is greedy; `max_new_tokens` counts generated tokens."""

    n: int
    temperature: float
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int


class Engine(Protocol):
    """Anything that answers requests in order, `sampling.n` completions each."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]]: ...


def open_engine(policy: Path, settings: dict[str, Any]) -> Engine:
    """The engine that `[engine] backend` names, with the policy loaded.

    Raises StageError when the backend is unknown or the policy's chat template takes no image.
    """
    backend = settings["backend"]
    if backend == "vllm":
        return VllmEngine(policy, settings)
    if backend == "transformers":
        return TransformersEngine(policy, settings)
    if ":" in backend:
        module, name = backend.split(":", 1)
        return getattr(importlib.import_module(module), name)(policy, settings)
    raise StageError(
        f"[engine] backend = {backend!r} is unknown; use vllm, transformers or module:function"
    )


class VllmEngine:
    """vLLM's offline engine. One request per image with `n` samples: one vision pass, one prefill."""

    def __init__(self, policy: Path, settings: dict[str, Any]):
        from transformers import AutoProcessor

        self._template = load_template(AutoProcessor.from_pretrained(policy), policy)
        on_gpu = os.path.exists("/dev/nvidia0")
        if not on_gpu:
            # In one process and with a small key-value cache a tiny model starts in seconds on a
            # CPU; the defaults would reserve gigabytes and spawn a second process.
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings["cpu_kv_cache_gib"]))
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            # Left to itself vLLM binds its threads to cores of its own choice, on top of those
            # that OMP_NUM_THREADS allows, and they wait for one another.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # Compiling small kernels takes longer than a small model gains by them.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        self._in_process = not on_gpu
        memory = {"gpu_memory_utilization": settings["gpu_memory_utilization"]} if on_gpu else {}
        # On a GPU the engine is a process of its own, whose later errors must reach the terminal.
        with nullcontext() if on_gpu else hushed():
            from vllm import LLM

            self._llm = LLM(
                model=str(policy),
                dtype=settings["dtype"],
                max_model_len=settings["max_model_len"],
                max_num_seqs=settings["max_num_seqs"],
                enforce_eager=not on_gpu,
                tensor_parallel_size=settings["tensor_parallel_size"],
                limit_mm_per_prompt={"image": 1},
                disable_log_stats=True,
                seed=0,
                **memory,
            )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Completions in the order of the requests, reproducible from `sampling.seed` on a CPU."""
        from vllm import SamplingParams

        if self._in_process:
            # The CPU sampler refuses a seed per request; it draws from torch's own generator.
            import torch

            torch.manual_seed(sampling.seed)
        parameters = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            seed=None if self._in_process else sampling.seed,
        )
        inputs = [
            {
                "prompt": self._template(request.text),
                "multi_modal_data": {"image": decode(request.image)},
            }
            for request in requests
        ]
        answers = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [[_from_vllm(output) for output in answer.outputs] for answer in answers]


class TransformersEngine:
    """Batched `generate`: slow, works for every architecture, agrees with training by definition."""

    BATCH = 32

    def __init__(self, policy: Path, settings: dict[str, Any]):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._torch = torch
        self._processor = AutoProcessor.from_pretrained(policy)
        self._template = load_template(self._processor, policy)
        self._processor.tokenizer.padding_side = "left"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings["dtype"]) if settings["dtype"] != "auto" else "auto"
        self._model = AutoModelForImageTextToText.from_pretrained(policy, dtype=dtype)
        self._model.to(device).eval()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Completions in the order of the requests."""
        self._torch.manual_seed(sampling.seed)
        answers: list[list[Completion]] = []
        for start in range(0, len(requests), self.BATCH):
            answers += self._batch(requests[start : start + self.BATCH], sampling)
        return answers

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        inputs = self._processor(
            text=[self._template(request.text) for request in requests],
            images=[[decode(request.image)] for request in requests],
            padding=True,
            return_tensors="pt",
        ).to(self._model.device)
        greedy = sampling.temperature == 0
        choice = (
            {"do_sample": False}
            if greedy
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
            }
        )
        output = self._model.generate(
            **inputs,
            **choice,
            num_return_sequences=sampling.n,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=sampling.max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :].cpu()
        logits = self._torch.stack(output.logits, 1).float().cpu()
        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        flat = [
            self._completion(row.tolist(), values.tolist(), ends)
            for row, values in zip(tokens, logprobs, strict=True)
        ]
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]

    def _completion(self, ids: list[int], logprobs: list[float], ends: set[int]) -> Completion:
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        stopped = length > 0 and ids[length - 1] in ends
        text = self._processor.tokenizer.decode(ids[:length], skip_special_tokens=True)
        mean = sum(logprobs[:length]) / length if length else 0.0
        return Completion(text, "stop" if stopped else "length", length, mean)


@contextmanager
def hushed() -> Iterator[None]:
    """Keep a library's start-up chatter off the terminal; show its end if the start fails.

    Some of it is written below Python, so the descriptors themselves are turned aside.
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


def load_template(processor: Any, policy: Path) -> Any:
    """A function from a user text to the prompt string with one image placeholder.

    Raises StageError when the policy has no chat template, or one that drops the image.
    """

    def render(text: str) -> str:
        return processor.apply_chat_template(
            prompts.chat(text), tokenize=False, add_generation_prompt=True
        )

    try:
        rendered = render("probe")
    except (ValueError, TypeError, AttributeError) as error:
        raise StageError(f"{policy} has no chat template for images: {error}") from error
    placeholder = getattr(processor, "image_token", None)
    if placeholder and rendered.count(placeholder) != 1:
        raise StageError(
            f"the chat template of {policy} puts {rendered.count(placeholder)} image placeholders "
            f"({placeholder}) into a prompt with one image; use a vision-language chat model"
        )
    return render


def decode(data: bytes) -> Image.Image:
    """Encoded bytes to an RGB picture."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def as_rollout(image_id: str, rollout: int, completion: Completion) -> dict[str, Any]:
    """A completion as a row of the rollouts table."""
    row = asdict(completion)
    return {"image_id": image_id, "rollout": rollout, "completion": row.pop("text"), **row}


def _from_vllm(output: Any) -> Completion:
    count = len(output.token_ids)
    total = output.cumulative_logprob or 0.0
    mean = total / count if count else 0.0
    return Completion(output.text, output.finish_reason or "unknown", count, mean)
