"""What the plan counts of Evaluate's modes and of prompts that training reads, worked out by hand."""

import pytest

from pipeline.__main__ import parser
from pipeline.cli import plan
from tests.pipeline.cli.test_plan import recipe  # noqa: F401  a fixture
from tests.pipeline.test_stage import config  # noqa: F401  the default luigi.cfg, to be changed


def test_a_plan_counts_what_evaluate_asks(recipe):
    def evaluated(*overlays: str) -> tuple[dict, dict]:
        recipe(*overlays)
        found = plan.plan("beetles", "dive_k", 0, plan.Estimates(answer_tokens=10))
        work = next(one for one in found["work"] if one["stage"] == "Evaluate zero_shot 0")
        return work, found["images"]["beetles"]

    adaptive, counts = evaluated("[Evaluate]\nmodes = adaptive\nnum_options = 4\n")
    # Val images are asked after 4, 8 and 20 samples, with two options and with four.
    assert counts["val"] == 24 * 6
    assert adaptive["completions"] == 720 * 21 + 144 * 26
    assert adaptive["images"] == 720 * 2 + 144 * 7
    assert adaptive["notes"][0].startswith("at most: adaptive with all samples, and the 144 val")
    alone, _ = evaluated("", "[Evaluate]\nmodes = one_step\nlimit = 10\n")
    assert (alone["images"], alone["completions"], alone["notes"]) == (20, 20, [])


def test_a_plan_counts_a_prompt_once_a_group_where_training_reads_it_once(recipe):
    read = []
    for overlays in ([], ["[Train]\nshared_prefix = false\n"]):
        recipe(*overlays)
        found = plan.plan("beetles", "dive_k", 0, plan.Estimates())
        read += [one["tokens_in"] for one in found["work"] if one["stage"] == "Train dive_k 0"]
    assert read[0] == 20 * 24 * found["prompt_tokens"]["beetles"]["question"]
    assert read[1] == 8 * read[0]


def test_hours_on_several_machines_add_up_to_those_of_the_stages(recipe):
    recipe("[Evaluate]\ndatasets = pets\n")
    rates = {"tokens_per_second": 1000.0, "gpus": 1, "scale": (1,)}
    found = plan.plan("beetles", "dive_k", 0, plan.Estimates(images=1000, **rates))
    names = [one["stage"] for one in found["work"]]
    assert len(set(names)) == len(names)
    assert "Evaluate dive_k 1 pets" in names
    (row,) = found["scale"]
    written = sum(one["hours"] for one in found["work"])
    assert row["causes"]["work"] == pytest.approx(written)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--scale", "-4"),
        ("--gpus", "0"),
        ("--images", "1.5"),
        ("--tokens-per-second", "-5"),
        ("--image-kb", "nan"),
        ("--chars-per-token", "0"),
    ],
)
def test_counts_and_rates_of_a_plan_are_above_zero(option, value, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["plan", option, value])
    assert ended.value.code == 2
    assert f"argument {option}: {value} is no " in capsys.readouterr().err
