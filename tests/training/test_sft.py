"""Supervised training that is cut off goes on with the very same result."""

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data_cards
from tasks.runtime import interrupts
from tasks.runtime.errors import StageError, Stopped
from tests.conftest import run_stage
from training import sft
from training.data import sft_examples
from training.loop import sft_checkpoint, supervised
from training.model import tiny_policy

pytestmark = pytest.mark.model
NAMES = ["rose gold-belt", "rose cyan-belt", "crimson gold-belt"]
WORDING = sft_examples.Wording("beetle", "species", "brief")
STEPS = 12


@pytest.fixture
def taught(tmp_path):
    """Teach a new model for STEPS steps; asked to stop after step `stop`, or killed in it."""

    def teach(name: str, stop: int = 0, kill: int = 0) -> SimpleNamespace:
        model = tiny_policy.new_model(0)
        processor = tiny_policy.processor(tiny_policy.slot_words(["species", "beetle", *NAMES]))
        made = SimpleNamespace(model=model, drawn=0, figures=None)

        def batches():
            rng = random.Random(0)
            while True:
                made.drawn += 1
                interrupts._Stop.asked = interrupts._Stop.asked or made.drawn == stop
                if made.drawn == kill:
                    raise ZeroDivisionError
                image = Image.new("RGB", (84, 84), tuple(rng.randbytes(3)))
                name = rng.choice(NAMES)
                yield [sft_examples.open_example(image, name, WORDING)]

        place = sft_checkpoint.place(tmp_path / name)
        made.figures = supervised.train_supervised(
            model, processor, batches(), steps=STEPS, learning_rate=0.01, muon_learning_rate=0.02,
            checkpoint=place,
        )  # fmt: skip
        return made

    return teach


def test_wherever_it_is_cut_off_it_ends_with_the_same_weights(taught, tmp_path, monkeypatch):
    whole = taught("whole")
    for name, cut in (
        ("stopped", {"stop": 7}),
        ("killed", {"kill": 6}),
        ("stopped at the end", {"stop": STEPS}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(interrupts._Stop, "asked", False)
            with pytest.raises((Stopped, ZeroDivisionError)):
                taught(name, **cut)
        saved = torch.load(sft_checkpoint.place(tmp_path / name), weights_only=True)
        assert saved["steps"] == cut.get("stop", 4), "every second step, and when it stops"
        again = taught(name)
        assert again.drawn == STEPS, "batches are drawn from the first one"
        assert again.figures == whole.figures
        before, after = whole.model.state_dict(), again.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_a_checkpoint_of_another_training_is_refused(taught, tmp_path):
    path = sft_checkpoint.place(tmp_path / "other")
    path.parent.mkdir(parents=True)
    torch.save({"steps": 3, "losses": [], "model": [{}]}, path)
    with pytest.raises(StageError, match="does not fit this training; delete it"):
        taught("other")


def test_pictures_are_of_the_size_that_the_policy_takes(drawn_once, tmp_path, monkeypatch):
    seen = []

    def taken(model, processor, batches, **_):
        seen.extend(next(batches))
        return {"final_loss": 0.0}

    monkeypatch.setattr(data_cards, "FOLDER", drawn_once / "cards")
    monkeypatch.setattr(sft, "train_supervised", taken)
    run_stage(sft.base_policy, 
        tmp_path, model="tiny", download=[drawn_once / "download"], split=[drawn_once / "split"],
        card="few", seed=0, prompt_style="brief", steps=1, batch_size=4, learning_rate=0.01,
        muon_learning_rate=0.02, question_share=0.5, blind_share=0.5, min_pixels=28**2,
        max_pixels=56**2, dtype="float32",
    )  # fmt: skip
    assert [example.image.size for example in seen] == [(56, 56)] * 4
