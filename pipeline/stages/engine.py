"""The section [engine] of luigi.cfg, which Propose and Evaluate share."""

from functools import cached_property
from typing import Any

import luigi

from pipeline.parameters import parameters
from pipeline.settings import Checked
from tasks.engines.settings import EngineSettings
from tasks.runtime.settings import rules


@parameters(EngineSettings)
class engine(Checked, luigi.Config):
    """[engine]: how Propose and Evaluate generate text."""

    @cached_property
    def settings(self) -> EngineSettings:
        return self.read(EngineSettings)

    def significant(self) -> dict[str, Any]:
        """The settings that can change a result, and are set."""
        return {
            f"engine.{name}": value
            for name, value in self.settings.values().items()
            if (rule := rules(EngineSettings)[name][1]).significant
            if rule.unset is None or value != rule.unset
        }
