"""[engine]: the one section that Propose and Evaluate share."""

from typing import Any
from urllib.parse import urlsplit

import luigi

from pipeline.settings import Checked, SettingsError
from pipeline.stage import plain


class engine(Checked, luigi.Config):
    """[engine]: how text is generated, once for Propose and Evaluate alike."""

    prompt_style = luigi.Parameter(description="wording of all prompts: brief or stepwise")
    list_position = luigi.Parameter(description="of a closed list: in_question or before_image")
    dtype = luigi.Parameter(description="auto, float32, bfloat16 or float16")
    quantization = luigi.Parameter(description="vLLM's: fp8, awq, bitsandbytes, ...; empty: none")
    lora = luigi.Parameter(description="a LoRA adapter's folder on top of the policy; empty: none")
    temperature = luigi.FloatParameter()
    top_p = luigi.FloatParameter()
    repetition_penalty = luigi.FloatParameter()
    max_new_tokens = luigi.IntParameter()
    backend = luigi.Parameter(
        significant=False, description="vllm, server, ray, transformers or module:function"
    )
    seeds = luigi.ChoiceParameter(
        choices=("request", "engine"),
        significant=False,
        description="who holds the seed: each request, or the engine",
    )
    processes = luigi.IntParameter(significant=False, description="engines; 0: one per device")
    max_model_len = luigi.IntParameter(significant=False)
    max_num_seqs = luigi.IntParameter(significant=False)
    max_num_batched_tokens = luigi.IntParameter(significant=False, description="0: vLLM's choice")
    gpu_memory_utilization = luigi.FloatParameter(significant=False)
    tensor_parallel_size = luigi.IntParameter(significant=False)
    cpu_kv_cache_gib = luigi.IntParameter(significant=False)
    server_url = luigi.Parameter(significant=False, description="an OpenAI-compatible endpoint")
    server_model = luigi.Parameter(significant=False, description="empty: the policy's folder")
    server_concurrency = luigi.IntParameter(significant=False, description="requests in flight")
    server_timeout = luigi.FloatParameter(significant=False, description="seconds for a request")
    ray_address = luigi.Parameter(significant=False, description="empty: a cluster on this machine")

    def everything(self) -> dict[str, Any]:
        """All values, for the stage that opens an engine."""
        if urlsplit(self.server_url).password:
            raise SettingsError(
                "luigi.cfg: [engine] server_url holds a password, which recipes would keep; give the "
                "key in the environment, as OPENAI_API_KEY"
            )
        return {name: plain(getattr(self, name)) for name, _ in self.get_params()}

    def significant(self) -> dict[str, Any]:
        """The values that can change what a result means."""
        return {
            f"engine.{n}": plain(getattr(self, n)) for n, p in self.get_params() if p.significant
        }
