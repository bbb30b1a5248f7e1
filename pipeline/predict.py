"""What `python -m pipeline predict` takes from luigi.cfg and the artifacts beside it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `tasks.predict.Predictor`: as in Evaluate, unless said otherwise.

    Without a luigi.cfg in this folder a policy must be named, and says itself how it was trained.
    """
    from tasks.engines.policies import recipe

    told: dict[str, Any] = {"engine": {}, "card": arguments.card, "policy": arguments.policy}
    if Path("luigi.cfg").is_file():
        from pipeline.settings import run
        from pipeline.tasks import Evaluate, engine

        own = Evaluate(dataset=arguments.dataset) if arguments.dataset else Evaluate()
        os.environ.setdefault("OMP_NUM_THREADS", str(run().cpu_threads))
        told["policy"] = told["policy"] or str(_newest(own))
        told["engine"] = engine().everything()
        told |= {name: getattr(own, name) for name in ("num_rollouts", "num_options", "prompt")}
        if "prompt_style" in recipe(Path(told["policy"])):  # it is asked as it was trained
            del told["engine"]["prompt_style"]
    elif not told["policy"]:
        sys.exit("error: no luigi.cfg here, so no newest policy; name one: --policy FOLDER")
    for name in ("backend", "max_new_tokens", "max_model_len"):
        if (value := getattr(arguments, name)) is not None:
            told["engine"][name] = value
    return told


def _newest(own: Any) -> Path:
    """The policy of the last round that was trained; leaves when there is none."""
    from pipeline.settings import run

    root = Path(run().artifacts) / "+".join(own.names)
    found = sorted(
        (root / own.method).glob("round*/train/current"),
        key=lambda path: int(path.parts[-3].removeprefix("round")),
    )
    if not found:
        sys.exit(
            f"error: no trained policy under {root / own.method}; run: make train, or name one: "
            "--policy FOLDER"
        )
    return found[-1].resolve()
