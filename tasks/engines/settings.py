"""The settings of [engine], which Propose and Evaluate share."""

from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from tasks.language.prompts import LIST_POSITIONS, STYLES
from tasks.runtime.errors import StageError
from tasks.runtime.settings import Settings, setting

BACKENDS = ("vllm", "server", "ray", "transformers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SEEDS = ("request", "engine")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """[engine]: how Propose and Evaluate generate text.

    Settings that cannot change a result have defaults here, which luigi.cfg repeats. A caller
    without a luigi.cfg sets only the others.
    """

    section: ClassVar[str] = "engine"

    prompt_style: str = setting("wording of all prompts", choices=STYLES)
    list_position: str = setting("of a closed list", choices=LIST_POSITIONS)
    dtype: str = setting(choices=DTYPES)
    quantization: str = setting("vLLM's: fp8, awq, bitsandbytes, ...; empty: none")
    lora: str = setting("a LoRA adapter's folder on top of the policy; empty: none")
    temperature: float = setting("of samples; greedy answers have 0", at_least=0)
    top_p: float = setting("of samples", above=0, at_most=1)
    repetition_penalty: float = setting("of samples; greedy answers have none", above=0)
    max_new_tokens: int = setting(at_least=1)
    max_pixels: int = setting(
        "the area that a larger image is reduced to; 0: the policy's", at_least=0, unset=0
    )
    backend: str = setting(
        f"{', '.join(BACKENDS)} or module:function", significant=False, default="vllm"
    )
    seeds: str = setting(
        "who holds the seed: each request, or the engine",
        choices=SEEDS,
        significant=False,
        default="request",
    )
    processes: int = setting("engines; 0: one per device", at_least=0, significant=False, default=0)
    max_model_len: int = setting(at_least=1, significant=False, default=512)
    max_num_seqs: int = setting(at_least=1, significant=False, default=512)
    max_num_batched_tokens: int = setting(
        "0: vLLM's choice", at_least=0, significant=False, default=0
    )
    gpu_memory_utilization: float = setting(above=0, at_most=1, significant=False, default=0.85)
    tensor_parallel_size: int = setting(at_least=1, significant=False, default=1)
    cpu_kv_cache_gib: int = setting(at_least=0, significant=False, default=1)
    server_url: str = setting(
        "an OpenAI-compatible endpoint", significant=False, default="http://127.0.0.1:8000/v1"
    )
    server_model: str = setting("empty: the policy's folder", significant=False, default="")
    server_concurrency: int = setting(
        "requests in flight", at_least=1, significant=False, default=64
    )
    server_timeout: float = setting(
        "seconds for a request", above=0, significant=False, default=600.0
    )
    ray_address: str = setting("empty: a cluster on this machine", significant=False, default="")

    def check(self) -> None:
        if self.backend not in BACKENDS and ":" not in self.backend:
            raise StageError(
                f"[engine] backend must be {', '.join(BACKENDS)} or your own module:function; got "
                f"{self.backend!r}"
            )
        if urlsplit(self.server_url).password:
            raise StageError(
                "[engine] server_url holds a password, which recipes would keep; give the key in the "
                "environment, as OPENAI_API_KEY"
            )
