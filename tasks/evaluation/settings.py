"""The settings of Judge."""

from dataclasses import dataclass
from typing import ClassVar

from tasks.runtime.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Settings):
    """[Judge]: the endpoint that is asked, and how."""

    section: ClassVar[str] = "Judge"

    url: str = setting("OpenAI-compatible; empty: no judge", significant=False)
    model: str = setting("the endpoint's name of the model that judges")
    api_key_env: str = setting("the variable that holds the key", significant=False)
    max_tokens: int = setting("of a verdict", at_least=1)
    concurrency: int = setting("requests in flight", at_least=1, significant=False)
    timeout: float = setting("seconds for a request", above=0, significant=False)
    attempts: int = setting("of a request, with backoff", at_least=1, significant=False)
    shard_size: int = setting("verdicts a shard", at_least=1, significant=False)
    max_failed_share: float = setting(
        "more pairs without a verdict: an error", at_least=0, at_most=1
    )
