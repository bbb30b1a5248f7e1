"""The prompt style direct: every stage asks for the answer alone, reads it, and pays for its form."""

from dataclasses import replace

import pytest

from pipeline import tasks
from pipeline.methods import FORMATS
from tasks.build_mcq import build_mcq
from tasks.evaluate import evaluate
from tasks.evaluation.settings import PredictSettings
from tasks.language import prompts
from tasks.language.answers import in_form
from tasks.predict import Predictor
from tasks.propose import propose
from tasks.questions.exchange_formats import export_questions
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.verl_reward import compute_score
from tests.conftest import ENGINE, evaluate_arguments, mcq_arguments, propose_arguments, run_stage
from tests.fakes import FakeEngine
from tests.pipeline.test_methods import graph, train
from tests.pipeline.test_stage import config  # noqa: F401  a fixture
from tests.training.test_grpo import arguments, frozen, trained  # noqa: F401
from training.data.reward_choice import PLAIN
from training.loop.diagnosis import WINDOW, warnings
from training.rewards import direct_format_reward

MODES = "one_step majority two_step mcq constrained adaptive"
ASKED: list[str] = []


class Direct(FakeEngine):
    """A FakeEngine that answers without a thought, as it is asked to, and notes the questions."""

    def generate(self, requests, sampling):
        ASKED.extend(request.text for request in requests)
        return super().generate(requests, sampling)

    def _answer(self, request, number, sampling):
        if request.key.isdigit():  # a prediction, whose image has no path
            request = replace(request, key="few/test/rose gold-belt/x")
        answer = super()._answer(request, number, sampling)
        return replace(answer, text=answer.text[answer.text.find("<answer>") :])


def direct(policy, settings) -> Direct:
    return Direct(policy, settings)


ENGINE_DIRECT = replace(ENGINE, backend=f"{__name__}:direct", prompt_style="direct")


@pytest.mark.parametrize(
    ("text", "paid"),
    [
        ("<answer>B</answer>", 1.0),
        (" <answer> Sooty Albatross </answer>\n", 1.0),
        ("<think>?</think><answer>B</answer>", 0.0),
        ("<think></think><answer>B</answer>", 0.0),
        ("It is <answer>B</answer>", 0.0),
        ("<answer>B</answer>.", 0.0),
        ("<answer>B</answer> <answer>B</answer>", 0.0),
        ("<answer><think>?</think>B</answer>", 0.0),
        ("<answer>B</think></answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("<answer>B", 0.0),
        ("B", 0.0),
        ("", 0.0),
    ],
)
def test_only_an_answer_block_alone_has_the_form(text, paid):
    assert direct_format_reward([text]) == [paid]
    chat = [{"role": "assistant", "content": text}]
    assert direct_format_reward(completions=[chat], label=[0]) == [paid]


@pytest.mark.parametrize("style", prompts.STYLES)
def test_each_style_has_a_reward_for_its_own_form_and_is_known_by_its_words(style):
    said = prompts.completion("Dark wings.", "B", style)
    paid = {name: PLAIN[name]([said])[0] for name in {"format", *FORMATS.values()}}
    assert paid == {name: float(name == FORMATS.get(style, "format")) for name in paid}
    assert in_form(said, style)
    closed = prompts.open_question("bird", "species", style=style, names=["Crow", "Gull"])
    asked = prompts.mcq_question("bird", "species", ["Crow", "Gull"], style=style)
    assert {prompts.style_of(closed), prompts.style_of(asked)} == {style}


def test_the_style_itself_decides_which_form_is_paid(config):
    """Also for a method of open questions, whose answer reward is another."""
    config.set("engine", "prompt_style", "direct")
    assert train("virft").settings.rewards == {"direct_format": 1.0, "exact": 1.0}
    assert train("caption").settings.rewards == {"caption_format": 1.0, "letter": 1.0}


def test_the_method_is_dive_k_in_that_style():
    stage, plain = train("direct"), train("dive_k")
    given, usual = stage.arguments(), plain.arguments()
    assert given["prompt_style"] == "direct"
    assert given["rewards"] == {"direct_format": 1.0, "letter": 1.0}
    differ = {key for key in given if given[key] != usual[key]}
    assert differ == {"method", "prompt_style", "rewards", "mcq"}
    asked = tasks.Evaluate(subset="", **graph("direct")).arguments()["engine"]["prompt_style"]
    assert asked == "direct"


def test_every_stage_asks_for_the_answer_alone_and_reads_it(split_set, tmp_path):
    ASKED.clear()
    folders = {name: tmp_path / name for name in ("propose", "mcq", "evaluated", "plain")}
    for folder in folders.values():
        folder.mkdir()
    run_stage(propose, folders["propose"], **propose_arguments(split_set, engine=ENGINE_DIRECT))
    split_set.propose = folders["propose"]
    given = mcq_arguments(split_set, prompt_style="direct")
    run_stage(build_mcq, folders["mcq"], **given)
    questions = shards.read(folders["mcq"], "mcq")["question"].to_pylist()
    asked = {"modes": MODES, "prompt": "closed_list"}
    run_stage(
        evaluate,
        folders["evaluated"],
        **evaluate_arguments(split_set, engine=ENGINE_DIRECT, **asked),
    )
    assert ASKED
    assert questions
    for text in (*ASKED, *questions):
        assert "think" not in text.lower()
        assert text.endswith("between <answer> and </answer>, and write nothing else.")
    run_stage(evaluate, folders["plain"], **evaluate_arguments(split_set, **asked))
    columns = ["image_id", "mode", "class_id", "answer", "status", "letter"]
    read = [
        shards.read(folders[n], "predictions", columns).to_pylist() for n in ("evaluated", "plain")
    ]
    assert read[0] == read[1], "the same answers, with a thought before them and without"
    assert {row["mode"] for row in read[0]} == set(MODES.split())


@pytest.mark.parametrize("mode", ["one_step", "two_step"])
def test_a_prediction_has_an_answer_and_no_reasoning(split_set, mode):
    ASKED.clear()
    from tests.language.test_prompts import PICTURE

    settings = PredictSettings(mode=mode)
    with Predictor(split_set.root, "few", engine=ENGINE_DIRECT, settings=settings) as predictor:
        (prediction,) = predictor.predict([PICTURE])
    assert prediction.answer == "rose gold-belt"
    assert prediction.reasoning == ""
    assert all(prompts.style_of(text) == "direct" for text in ASKED)


def test_verl_pays_for_the_form_that_an_exported_question_asks_for(rollouts, tmp_path):
    for style, thinks in (("direct", False), ("brief", True)):
        mcq, out = tmp_path / style, tmp_path / f"{style}-out"
        mcq.mkdir()
        run_stage(build_mcq, mcq, **mcq_arguments(rollouts, prompt_style=style))
        export_questions(mcq, "verl", out)
        row = next(iter(shards.iter_rows(out, "train")))
        letter, extra = row["reward_model"]["ground_truth"], row["extra_info"]
        asked = row["prompt"][0]["content"]
        assert "the letter of one option between <answer>" in asked
        assert ("<think>" in asked) == thinks
        alone = f"<answer>{letter}</answer>"
        assert compute_score("few", alone, letter, extra) == 2 - thinks
        assert compute_score("few", f"<think>?</think>{alone}", letter, extra) == 1 + thinks
        del extra["prompt_style"]  # as in an export of before
        assert compute_score("few", f"<think>?</think>{alone}", letter, extra) == 2


def test_a_template_that_begins_a_thought_is_refused():
    from tests.test_templates import processor
    from training.model import processors

    processors.check(processor("<think>"), [], "brief")
    processors.check(processor(""), [], "direct")
    with pytest.raises(StageError, match="begins every answer with <think>, and the prompt style"):
        processors.check(processor("<think>\n"), [], "direct")


def test_completions_that_become_answers_alone_are_no_trouble_where_that_is_paid_for():
    log = [{"completion_length": 100.0 - 9 * n, "reward": float(n)} for n in range(2 * WINDOW)]
    log = [{**row, "completion_length": max(5.0, row["completion_length"])} for row in log]
    assert list(warnings(log)) == ["length"]
    assert warnings([{**row, "reward/direct_format": 1.0} for row in log]) == {}
    never = [{**row, "reward/direct_format": 0.0} for row in log]
    assert list(warnings(never)) == ["format"]


@pytest.mark.model
@pytest.mark.parametrize("shared", [True, False])
def test_training_asks_pays_and_tells_the_truth_without_a_thought(frozen, tmp_path, shared):
    rewards = {"letter": 1.0, "direct_format": 1.0}
    given = arguments(frozen, prompt_style="direct", truth_rollout=True, steps=2, rewards=rewards)
    folder = trained(
        tmp_path / "out", given | {"max_completion_length": 16, "shared_prefix": shared}
    )
    rows = shards.read(folder, "completions").to_pylist()
    for truth in rows[3::4]:
        assert truth["completion"].startswith("<answer>")
        assert truth["reward/letter"] == truth["reward/direct_format"] == 1.0
    assert "questions about an image with `<answer>name</answer>`." in " ".join(
        (folder / "README.md").read_text().split()
    )


@pytest.mark.model
def test_supervised_examples_have_no_thought():
    from training.data.sft_examples import Wording, mcq_example, open_example
    from training.sft_baseline import example

    wording = Wording("bird", "species", "direct")
    row = {"options": ["Crow", "Gull"], "answer_letter": "B", "prompt": [], "image": None}
    said = [
        open_example(None, "Gull", wording).completion,
        mcq_example(None, "Gull", ["Crow", "Gull"], wording).completion,
        example(row, "direct")["completion"][0]["content"],
    ]
    assert said == ["<answer>Gull</answer>"] * 3
