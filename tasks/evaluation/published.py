"""The published figures and budgets, the only place that holds them, with how sure each is.

Source: arXiv 2511.18305 (DiVE-k, ICLR 2026) and its code, https://github.com/raja-kumar/DiVE-k. Known
as means over the five sets are the base-to-novel, mixed and four-shot figures. Known by set are two:
the gain on CUB, and the harmonic means on Pets. No other figure of a single set is known here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

SOURCE = "arXiv 2511.18305"
SETS = ("aircraft", "cars", "cub", "flowers", "pets")
PROTOCOL = (
    "Accuracy in %, of Qwen2.5-VL-7B, on the val images of each set (of Flowers, CoOp's test images of "
    "novel classes), where a language model judged the names. Which of the two modes, one step or two "
    "steps, the figures are of is not known here."
)
GROUPS = ("base", "novel", "harmonic_mean")  # the keys of a row's figures, in %
Row = dict[str, Any]  # `of` what, the row's `name`, figures in % by group, and a `note`

MEAN = "mean over aircraft, cars, cub, flowers and pets"
BASE_TO_NOVEL: list[Row] = [
    {"of": MEAN, "name": "zero_shot", "base": 68.9, "novel": 70.5, "harmonic_mean": 69.7},
    {"of": MEAN, "name": "virft", "base": 73.0, "novel": 74.2, "harmonic_mean": 73.6},
    {"of": MEAN, "name": "dive_k", "base": 80.8, "novel": 78.8, "harmonic_mean": 79.8},
]
BY_SET: dict[str, list[Row]] = {
    "cub": [
        {
            "of": "cub",
            "name": "dive_k",
            "note": "harmonic mean +14.9 points, taken to be over the base policy",
        }
    ],
    "pets": [
        {"of": "pets", "name": "virft", "harmonic_mean": 92.9},
        {"of": "pets", "name": "dive_k", "harmonic_mean": 91.6, "note": "below virft"},
    ],
}
MIXED: list[Row] = [
    {
        "of": "one policy for the five sets, mean",
        "name": "dive_k",
        "harmonic_mean": 78.7,
        "note": "+4.0 over virft, +9.0 over the base policy",
    }
]
FOUR_SHOT: list[Row] = [
    {
        "of": "four images of every class, mean over the five sets",
        "name": "dive_k",
        "base": 74.75,
        "note": "+7.7 and +10.9, taken to be over virft and the base policy",
    }
]

# Passes over the questions, in the training scripts. The scripts' epochs run over questions that are
# kept, and the stored results are of step 400: so about 400 steps is inferred, for every set.
EPOCHS = {"cub": 1.5, "flowers": 3.2, "pets": 4.1, "cars": 1.1, "aircraft": 1.9}
STEPS = 400
FEW_SHOT_STEPS = 200


def text(figure: float) -> str:
    """A figure as it was published, with one decimal or two."""
    return f"{figure:.2f}".removesuffix("0")


def figures_for(tables: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The published figures that stand beside a comparison's sets; empty without one of the five.

    Each table has `set`, `trained_on` and `images` (counts by group). A mix of the five has the mixed
    figures, and a set without novel classes those of four shots.
    """
    ours = [table for table in tables if table["set"] in SETS]
    rows: list[Row] = []
    if any("novel" in table["images"] and table["trained_on"] == table["set"] for table in ours):
        own = {table["set"] for table in ours}
        rows += [row for name in SETS if name in own for row in BY_SET.get(name, [])]
        rows += BASE_TO_NOVEL
    if any(tuple(sorted(table["trained_on"].split("+"))) == SETS for table in ours):
        rows += MIXED
    if any("novel" not in table["images"] for table in ours):
        rows += FOUR_SHOT
    return rows
