"""How every benchmark leaves its figures: with the machine, the versions and the settings."""

import json
from pathlib import Path
from typing import Any

from pipeline.artifacts import store


def write(path: Path | None, figures: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the list of {figure, value, goal, unit}, unless no path was given."""
    if path is None:
        return
    machine = {**store.host(), "versions": store.versions()}
    told = {"figures": figures, "machine": machine, "settings": settings}
    path.write_text(json.dumps(told, indent=1, default=str))
