"""The wording of prompts: what each style asks for, and what the published runs' style leaves unasked."""

from dataclasses import replace

import pytest
from PIL import Image

from tasks.engines.base import Completion
from tasks.evaluate import evaluate
from tasks.evaluation.settings import PredictSettings
from tasks.language.prompts import STYLES, mcq_question, open_question
from tasks.predict import Predictor
from tasks.propose import propose
from tests.conftest import ENGINE, evaluate_arguments, propose_arguments, run_stage
from tests.fakes import FakeEngine

NAMES = ["Crow", "Gull"]
COMPARING = ("trait", "compar", "apart", "differ", "distinguish", "describe", "visible", "feature")
SPECIES = ("amber gold-belt", "teal gold-belt")
PICTURE = Image.new("RGB", (40, 30))
ASKED: list[tuple[bool, float, str]] = []  # greedy, penalty and text of each request


class Listening(FakeEngine):
    """A FakeEngine that notes every request."""

    def generate(self, requests, sampling):
        greedy = sampling.temperature == 0
        ASKED.extend((greedy, sampling.repetition_penalty, request.text) for request in requests)
        if requests[0].key.isdigit():  # a prediction, whose image has no path
            answers = [
                Completion(f"<answer>{SPECIES[i % 2]}</answer>", "stop", 5, -1.0)
                for i in range(sampling.n)
            ]
            return [answers for _ in requests]
        return super().generate(requests, sampling)


def listening(policy, settings) -> Listening:
    return Listening(policy, settings)


PAPER = replace(
    ENGINE, backend=f"{__name__}:listening", prompt_style="paper", repetition_penalty=1.1
)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_asks_for_an_answer_and_all_but_direct_for_a_thought(style):
    chosen = mcq_question("bird", "species", NAMES, style=style)
    for text in (open_question("bird", "species", style=style), chosen):
        assert ("<think>" in text) == (style != "direct")
    listed = open_question("bird", "species", style=style, names=NAMES)
    assert "Crow; Gull" in listed
    assert "A. Crow\nB. Gull\n" in mcq_question("bird", "species", NAMES, style=style)
    for text in (listed, open_question("bird", "species", style=style, one_step=True)):
        assert text.count("<answer>") == text.count("</answer>") == 1
    with pytest.raises(ValueError, match="prompt_style"):
        open_question("bird", "species", style="loud")


def test_the_published_style_asks_for_no_traits_and_no_comparison():
    asked = open_question("bird", "species", style="paper", names=NAMES)
    chosen = mcq_question("bird", "species", NAMES, style="paper")
    for text in (asked, chosen):
        assert not [word for word in COMPARING if word in text.lower()]
        assert text.index("<think>") < text.index("<answer>")
    assert "name" in asked
    assert "letter" in chosen
    stepwise = mcq_question("bird", "species", NAMES, style="stepwise").lower()
    assert [word for word in COMPARING if word in stepwise], "the list above finds what it is for"


def test_the_published_one_step_question_asks_for_a_shortlist_then_one_name():
    alone = open_question("bird", "species", style="paper", names=NAMES, one_step=True)
    places = [alone.index(word) for word in ("<think>", "five", "apart", "<answer>")]
    assert places == sorted(places)
    for style in ("brief", "stepwise", "caption", "direct"):
        same = open_question("bird", "species", style=style, one_step=True)
        assert same == open_question("bird", "species", style=style)


def test_only_samples_have_a_penalty_and_only_one_step_has_its_own_question(split_set, tmp_path):
    ASKED.clear()
    proposed, evaluated = tmp_path / "proposed", tmp_path / "evaluated"
    proposed.mkdir()
    evaluated.mkdir()
    run_stage(propose, proposed, **propose_arguments(split_set, engine=PAPER))
    sampled = open_question("beetle", "species", style="paper")
    assert set(ASKED) == {(False, 1.1, sampled)}
    ASKED.clear()
    modes = "one_step majority two_step mcq constrained"
    run_stage(evaluate, evaluated, **evaluate_arguments(split_set, engine=PAPER, modes=modes))
    assert {text for greedy, _, text in ASKED if not greedy} == {sampled}
    assert {penalty for greedy, penalty, _ in ASKED if not greedy} == {1.1}
    assert {penalty for greedy, penalty, _ in ASKED if greedy} == {1.0}
    alone = {text for greedy, _, text in ASKED if greedy and "\nA. " not in text}
    assert alone == {open_question("beetle", "species", style="paper", one_step=True)}


@pytest.mark.parametrize("mode", ["one_step", "two_step"])
def test_predictions_are_asked_in_the_same_words(split_set, mode):
    ASKED.clear()
    with Predictor(
        split_set.root, "few", engine=PAPER, settings=PredictSettings(mode=mode)
    ) as predictor:
        predictor.predict([PICTURE])
    one_step = mode == "one_step"
    (first, *others) = ASKED
    text = open_question("beetle", "species", style="paper", one_step=one_step)
    assert first == (one_step, 1.0 if one_step else 1.1, text)
    assert all((greedy, penalty) == (True, 1.0) for greedy, penalty, _ in others)
    assert bool(others) != one_step
