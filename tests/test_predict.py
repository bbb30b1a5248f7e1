"""Predictor: two steps and one, images of every kind, the card of a policy, errors."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data_cards
from pipeline.cli.predict import summary
from tasks.engines.base import Completion
from tasks.engines.settings import EngineSettings
from tasks.evaluate import evaluate
from tasks.evaluation import adaptive
from tasks.evaluation.adaptive import Thresholds
from tasks.evaluation.prediction import engine_settings
from tasks.evaluation.settings import PredictSettings
from tasks.language.answers import reasoning
from tasks.predict import Predictor
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ENGINE, evaluate_arguments, run_stage

SETTINGS = ("mode", "num_rollouts", "num_options", "prompt", "thresholds")
NAMES = ("amber beetle", "teal beetle", "rose beetle")


class Oracle:
    """Reads the truth off a picture's brightness; samples name it 3 times of 4, or a neighbour."""

    constrained = True

    def __init__(self, policy, settings):
        self.asked: list[list] = []
        self.closed = False

    def check(self, request):
        self.asked.append(["check", request.text])

    def generate(self, requests, sampling):
        self.asked.append([sampling.n, sampling.temperature, *(r.text for r in requests)])
        return [[self.say(request, i) for i in range(sampling.n)] for request in requests]

    def say(self, request, number: int) -> Completion:
        level = request.picture.getpixel((0, 0))[0] // 50
        if level == 4:
            return Completion("cannot say", "length", 9, -1.0)
        if level == 3:
            return Completion("<answer>a spoon</answer>", "stop", 9, -1.0)
        if "\nA. " in request.text:
            return Completion(f"<think>Look.</think><answer>{NAMES[level]}</answer>", "stop", 5, 0)
        name = NAMES[level - (number % 4 == 3)]
        if level == 2:
            name = NAMES[level]
        return Completion(f"<think>{name}!</think><answer>{name}</answer>", "stop", 9, -1 / (number + 1))  # fmt: skip

    def close(self):
        self.closed = True


OPENED: list[Oracle] = []


def oracle(policy, settings) -> Oracle:
    OPENED.append(Oracle(policy, settings))
    return OPENED[-1]


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (level * 50 + 10,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def policy(tmp_path) -> Path:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text('{"text_config": {"max_position_embeddings": 2048}}')
    OPENED.clear()
    return folder


def predictor(policy, **changed) -> Predictor:
    """One that asks an Oracle; `changed` are settings, and keyword arguments of Predictor."""
    settings = {"num_rollouts": 8} | {k: changed.pop(k) for k in SETTINGS if k in changed}
    given = {"classes": NAMES, "noun": "beetle", "kind": "species"} | changed
    return Predictor(policy, **given, engine=asked_by(policy), settings=PredictSettings(**settings))


def asked_by(policy: Path, **changed) -> EngineSettings:
    oracle = {"backend": "tests.test_predict:oracle", "prompt_style": "brief"}
    return replace(engine_settings(policy), **oracle | changed)


def test_two_steps_give_candidates_votes_reasoning_and_confidence(policy):
    with predictor(policy) as ours:
        found = ours.predict([picture(1)])[0]
    assert found.answer == "teal beetle"
    assert found.class_id == 1
    assert found.candidates == [("teal beetle", 6), ("amber beetle", 2)]
    assert found.confidence == 6 / 8
    assert sorted(found.options) == ["amber beetle", "teal beetle"]
    assert found.letter == "AB"[found.options.index("teal beetle")]
    assert found.reasoning == "Look."
    check, first, second = OPENED[0].asked
    assert check == ["check", first[2]]
    assert first[:2] == [8, 1.0]
    assert "What species of beetle is this?" in first[2]
    assert second[:2] == [1, 0.0]
    assert OPENED[0].closed


def test_an_engine_is_shown_pictures_as_it_decodes_them(policy):
    with predictor(policy) as ours:
        ours.predict([picture(1)])
        OPENED[-1].decode = lambda data: Image.new("RGB", (8, 8), (100, 0, 0))
        assert ours.predict([picture(1)])[0].answer == NAMES[2]


def test_where_all_samples_agree_the_likeliest_one_tells_why(policy):
    found = predictor(policy).predict([picture(2)])[0]
    assert (found.answer, found.confidence, found.options) == ("rose beetle", 1.0, [])
    assert found.status == "single_candidate"
    assert found.reasoning == "rose beetle!"
    assert len(OPENED[0].asked) == 2, "one candidate needs no second question"


def test_one_step_asks_once_and_greedily(policy):
    found = predictor(policy, mode="one_step").predict([picture(1), picture(3)])
    assert [each.answer for each in found] == ["teal beetle", ""]
    assert found[0].confidence is None
    assert found[0].reasoning == "teal beetle!"
    assert found[1].other_answers == [("a spoon", 1)]
    assert OPENED[0].asked[-1][:2] == [1, 0.0]


def test_what_names_no_class_is_told_and_no_guess_is_made(policy):
    spoon, cut = predictor(policy).predict([picture(3), picture(4)])
    assert (spoon.answer, spoon.class_id, spoon.status) == ("", None, "no_candidates")
    assert spoon.other_answers == [("a spoon", 8)]
    assert (cut.num_unparsed, cut.cut, cut.confidence) == (8, 8, 0.0)
    told = summary([spoon, cut], 32)
    assert told[0] == "2 images: 2 without a class"
    assert "8 answers were cut at 32 tokens: --max-new-tokens" in told[-1]


def test_pictures_bytes_and_paths_are_alike_and_order_is_kept(policy, tmp_path):
    path = tmp_path / "one.png"
    path.write_bytes(picture(1))
    given = [picture(2), path, b"nothing", Image.open(path), str(path), tmp_path / "none.png"]
    found = predictor(policy).predict(given)
    assert [each.answer for each in found] == ["rose beetle", *["teal beetle"] * 1, "", *["teal beetle"] * 2, ""]  # fmt: skip
    assert [each.image for each in found[:3]] == ["image 0", str(path), "image 2"]
    assert [each.error for each in found if each.error] == [
        "not an image in a known format",
        "No such file or directory",
    ]
    assert found[2].status == "unreadable"


def test_an_image_that_the_engine_refuses_is_named_and_the_others_answered(policy, monkeypatch):
    def generate(self, requests, sampling):
        if any(request.picture.getpixel((0, 0))[0] // 50 == 0 for request in requests):
            raise ValueError("too dark")
        return [[self.say(request, i) for i in range(sampling.n)] for request in requests]

    monkeypatch.setattr(Oracle, "generate", generate)
    found = predictor(policy).predict([picture(1), picture(0)])
    assert found[0].answer == "teal beetle"
    assert (found[1].answer, found[1].status, found[1].error) == ("", "refused", "too dark")


def test_it_answers_as_evaluate_does(split_set, tmp_path):
    """The same engine, prompts, votes and reading; only the draws have other keys."""
    output = split_set.root / "evaluate"
    output.mkdir()
    arguments = evaluate_arguments(split_set, modes="one_step")
    run_stage(evaluate, output, **arguments)
    rows = shards.read(output, "predictions").to_pylist()[:8]
    images = shards.ImageStore(split_set.download).read([row["image_id"] for row in rows])
    asked = {}

    class Recorder:
        def generate(self, requests, sampling):
            asked.update({request.image: request.text for request in requests})
            return [[Completion("", "stop", 0, 0.0)] * sampling.n for _ in requests]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.predict.open_engine", lambda policy, settings: Recorder())
        ours = Predictor(split_set.root, split_set.card, engine=ENGINE)
        ours.predict(list(images.values()))
    assert set(asked.values()) == {ours._text}
    assert set(asked) == set(images.values()), "pictures reach the engine as Download keeps them"


def test_the_adaptive_mode_asks_no_more_than_its_thresholds_want(policy, tmp_path):
    asked = {"num_rollouts": 8, "num_options": 5, "instalments": "4", "prompt": "open"}
    thresholds = Thresholds(stop=1.0, agree=0.75, pair=1.0)
    adaptive.save(tmp_path, thresholds, {}, asked)
    with predictor(policy, mode="adaptive", thresholds=str(tmp_path)) as ours:
        rose, teal = ours.predict([picture(2), picture(1)])
    assert (rose.answer, rose.num_rollouts, rose.options) == ("rose beetle", 4, [])
    assert (rose.status, rose.confidence) == ("4 of 4 votes", 1.0)
    assert (teal.answer, teal.num_rollouts) == ("teal beetle", 8)
    assert sorted(teal.options) == ["amber beetle", "teal beetle"]
    _, first, second, question = OPENED[-1].asked
    assert [len(call) - 2 for call in (first, second, question)] == [2, 1, 1]
    assert [call[0] for call in (first, second, question)] == [4, 4, 1]
    adaptive.save(tmp_path, replace(thresholds, agree=0.5), {}, asked)
    with predictor(policy, mode="adaptive", thresholds=str(tmp_path)) as ours:
        (teal,) = ours.predict([picture(1)])
    assert (teal.answer, teal.status, teal.options) == ("teal beetle", "6 of 8 votes", [])
    assert [call[0] for call in OPENED[-1].asked[1:]] == [4, 4], "no question is asked"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mode": "three_step"}, "mode must be two_step, one_step or adaptive; got 'three_step'"),
        ({"mode": "adaptive"}, "mode adaptive needs thresholds"),
        ({"thresholds": "here"}, "thresholds are for mode adaptive"),
        ({"num_rollouts": 0}, "num_rollouts must be at least 1; got 0"),
        ({"num_options": 27}, "num_options must be at least 2 and at most 26; got 27"),
        ({"prompt": "closed"}, "prompt must be open or closed_list"),
        ({"classes": ["one"]}, "two or more classes; got 1"),
        ({"classes": ["Rose", "rose"]}, "cannot be told apart"),
        ({"card": "few"}, "a card or classes, not both"),
        ({"classes": None}, r"say what the images may show: .*--card"),
        ({"classes": None, "card": "beatles"}, "there is no data card"),
    ],
)
def test_what_cannot_be_asked_is_said(policy, changed, told):
    with pytest.raises(StageError, match=told):
        predictor(policy, **changed)


def test_a_policy_of_this_pipeline_says_itself_what_it_was_trained_on(policy, few_beetles):
    recipe = {"card": "few", "prompt_style": "brief", "max_completion_length": 48}
    (policy / "recipe.json").write_text(json.dumps(recipe))
    ours = Predictor(policy)
    assert ours.card.name == "few"
    told = ours.engine_settings
    assert (told.prompt_style, told.max_new_tokens, told.max_model_len) == ("brief", 48, 2048)
    (policy / "recipe.json").write_text(json.dumps(recipe | {"card": "few+bugs"}))
    with pytest.raises(StageError, match=r"--card, --classes\); it was trained on few\+bugs"):
        Predictor(policy)


def test_a_thought_is_shown_even_when_its_tags_are_broken():
    assert reasoning("<think> a\nb </think><answer>c</answer>") == "a\nb"
    assert reasoning("long ears</think><answer>c</answer>") == "long ears"
    assert reasoning("no tags") == "no tags"


def test_a_card_can_be_given_as_it_is(policy, few_beetles):
    ours = Predictor(policy, few_beetles, engine=asked_by(policy, backend="x:y"))
    assert ours.card is few_beetles
    assert Predictor(policy, "few").card == data_cards.load("few")
