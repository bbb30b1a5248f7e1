"""Merges a policy's adapters into whole weights, for a server, another program or the hub.

    python -m training.export TRAIN_FOLDER OUT

`AutoModelForImageTextToText.from_pretrained` and vLLM load OUT without its base.
"""

import argparse
import sys
from pathlib import Path

from tasks.engines import adapters
from tasks.runtime.command import quiet_libraries
from tasks.runtime.errors import StageError
from training.loop.policy_folder import merged_card


def export(policy: Path, output: Path) -> None:
    """Write the policy with its adapters merged into the folder `output`.

    Raises StageError when it has no adapters, when its base is missing, or when `output` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise StageError(f"{output} is not empty; give a folder that is not there yet")
    output.mkdir(parents=True, exist_ok=True)
    adapters.merge(policy, output)
    card = policy / "README.md"
    if card.is_file():
        (output / "README.md").write_text(merged_card(card.read_text("utf-8")), "utf-8")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", type=Path, metavar="TRAIN_FOLDER", help="a trained policy")
    parser.add_argument("output", type=Path, metavar="OUT", help="a folder for the whole weights")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        export(arguments.policy, arguments.output)
    except (StageError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output} holds the whole weights of {arguments.policy}")


if __name__ == "__main__":
    main()
