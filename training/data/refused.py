"""Says which images are left out of training because the policy's image processor refuses them."""

import os

from tasks.runtime.errors import StageError

LOST = 0.02  # the largest share, that of [Propose] max_lost_share in the default luigi.cfg


def left_out(
    refused: dict[str, str], total: int, what: str, stage: str, most: float = LOST
) -> None:
    """Print how many of `total` images are left out, and the first of them with its reason.

    `refused` has the reasons by image id; `what` are the images, in the plural. Raises StageError when
    more than a share of `most` is refused, and more than one.
    """
    if not refused:
        return
    image_id, reason = next(iter(refused.items()))
    sentence = (
        f"{len(refused)} of {total} {what} cannot be shown to the policy: {image_id}: {reason}"
    )
    if len(refused) > max(1, most * total) or len(refused) == total:
        raise StageError(f"{sentence}; more than {most:.0%}: crop such images, or remove them")
    if os.environ.get("RANK", "0") == "0":
        print(f"{stage}: {sentence}; they are left out", flush=True)
