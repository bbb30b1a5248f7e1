"""[engine]: the one section that Propose and Evaluate share."""

from functools import cached_property
from typing import Any

import luigi

from pipeline.parameters import parameters
from pipeline.settings import Checked
from tasks.engines.settings import EngineSettings
from tasks.runtime.settings import rules


@parameters(EngineSettings)
class engine(Checked, luigi.Config):
    """[engine]: how text is generated, once for Propose and Evaluate alike."""

    @cached_property
    def settings(self) -> EngineSettings:
        return self.read(EngineSettings)

    def significant(self) -> dict[str, Any]:
        """The values that can change what a result means."""
        values = self.settings.values()
        counts = [name for name, (_, rule) in rules(EngineSettings).items() if rule.significant]
        return {f"engine.{name}": values[name] for name in counts}
