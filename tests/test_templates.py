"""Chat templates that end in <think>, that raise, and marks of theirs among a card's words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from data_cards import Card
from tasks.engines import policies
from tasks.engines.base import Completion, PromptBuilder, Request, Sampling
from tasks.engines.refusals import generate_or_refuse
from tasks.evaluate import evaluate
from tasks.language import prompts
from tasks.propose import propose
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ENGINE, evaluate_arguments, propose_arguments, run_stage
from tests.fakes import FakeEngine
from tests.test_predict import asked_by, picture, policy  # noqa: F401
from training.data import sft_examples
from training.loop import supervised
from training.model import processors, tiny_policy

ASKS = "<|im_start|>assistant\n"
SAID = "It looks like rose gold-belt.</think><answer>rose gold-belt</answer>"


def processor(ends: str = "", start: str = ""):
    """The tiny policy's processor, with a template that begins with `start` and ends in `ends`."""
    made = tiny_policy.processor(["rose", "gold-belt", "beetle", "species"])
    template = made.chat_template.replace(r"assistant" + "\n", "assistant\n" + ends)
    made.chat_template = start + template
    return made


@pytest.mark.parametrize(
    ("ends", "opening"),
    [("", ""), ("<think>", "<think>"), ("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", "")],
)
def test_a_tag_at_the_end_of_a_prompt_is_the_completions(ends, opening):
    made = processor(ends)
    assert prompts.rendered(made, prompts.chat("?")).endswith(ASKS + ends)
    assert prompts.opening(made) == opening


class Opened(FakeEngine):
    """Its policy's template wrote <think>, so its answers go on after that."""

    opening = "<think>"

    def _answer(self, request, number, sampling):
        if request.key.isdigit():
            return Completion(SAID, "stop", 9, -1.0)
        answer = super()._answer(request, number, sampling)
        return replace(answer, text=answer.text.removeprefix("<think>"))


def opened(policy, settings) -> Opened:
    return Opened(policy, settings)


OPENS = replace(ENGINE, backend="tests.test_templates:opened")


@pytest.mark.parametrize(
    ("choices", "text", "becomes"),
    [
        ((), SAID, f"<think>{SAID}"),
        ((), f"<think>{SAID}", f"<think>{SAID}"),  # as some servers put it back
        ((), "", "<think>"),
        (("A", "B"), "B", "B"),
    ],
)
def test_the_tag_is_put_back_but_into_no_bare_letter(choices, text, becomes):
    says = SimpleNamespace(
        opening="<think>",
        generate=lambda requests, sampling: [[Completion(text, "stop", 1, 0.0)]] * len(requests),
    )
    request = Request("x", b"", "?", choices=choices)
    ((answer,),) = generate_or_refuse(says, [request], Sampling(1, 1, 1, 1, 9, 0), {})
    assert answer.text == becomes


def test_rollouts_predictions_and_their_reasoning_have_the_tag(split_set, policy):
    from tasks.evaluation.settings import PredictSettings
    from tasks.language.answers import parse
    from tasks.predict import Predictor

    output = split_set.root / "e"
    output.mkdir()
    run_stage(evaluate, output, **evaluate_arguments(split_set, engine=OPENS))
    completions = shards.read(output, "rollouts")["completion"].to_pylist()
    assert all(text.count("<think>") == 1 for text in completions)
    assert sum(parse(text).well_formed for text in completions) > len(completions) / 2
    rows = shards.read(output, "predictions").to_pylist()
    shown = [row["completion"] for row in rows if row["mode"] == "two_step" and row["completion"]]
    assert shown
    assert all(text.startswith("<think>") for text in shown)
    engine = asked_by(policy, backend="tests.test_templates:opened")
    settings = PredictSettings(mode="one_step")
    names = ("rose gold-belt", "teal gold-belt")
    with Predictor(policy, classes=names, engine=engine, settings=settings) as ours:
        (prediction,) = ours.predict([picture(1)])
    assert prediction.completion == f"<think>{SAID}"
    assert prediction.reasoning == "It looks like rose gold-belt."


@pytest.mark.parametrize("ends", ["", "<think>", "<think>\n"])
def test_supervised_examples_teach_what_follows_the_tag(ends):
    made = processor(ends)
    wording = sft_examples.Wording("beetle", "species", "brief")
    example = sft_examples.open_example(Image.new("RGB", (84, 84)), "rose gold-belt", wording)
    inputs = supervised.collate(made, [example])
    (ids,), (labels,) = inputs["input_ids"], inputs["labels"]
    taught = made.tokenizer.decode(ids[labels != -100])
    assert taught == ("" if ends else "<think>") + f"{SAID}<|im_end|>"
    asked = made.tokenizer.decode(ids[labels == -100])
    assert asked.endswith("assistant\n" + ends)


@pytest.mark.parametrize("ends", ["", "<think>"])
def test_the_supervised_baseline_teaches_what_follows_the_tag(ends):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    from training.sft_baseline import example

    made = processor(ends)
    row = {"prompt": [{"role": "user", "content": "?"}], "options": ["rose gold-belt"],
           "answer_letter": "A", "image": Image.new("RGB", (84, 84))}  # fmt: skip
    batch = DataCollatorForVisionLanguageModeling(made, completion_only_loss=True)([example(row)])
    (ids,), (labels,) = batch["input_ids"], batch["labels"]
    taught = made.tokenizer.decode(ids[labels != -100])
    assert taught.strip() == ("" if ends else "<think>") + f"{SAID}<|im_end|>"
    assert made.tokenizer.decode(ids).count(f"assistant\n<think>{SAID}") == 1


@pytest.mark.model
@pytest.mark.parametrize("dynamic_sampling", [0, 2])
def test_a_good_completion_earns_its_format_in_training(drawn_once, tmp_path, dynamic_sampling):
    import shutil

    import data_cards
    from tests.training.test_grpo import arguments, cards_of, freeze, trained

    for name in ("download", "split"):
        shutil.copytree(drawn_once / name, tmp_path / name)
    with cards_of(drawn_once):
        freeze(tmp_path)
        card = data_cards.load("few")
        words = tiny_policy.slot_words([card.kind, card.noun, *card.classes])
        model, made = tiny_policy.build(words, seed=3)
        made.chat_template = made.chat_template.replace("assistant\n", "assistant\n<think>\n")
        tiny_policy.save(model, made, tmp_path / "policy")
        given = arguments(tmp_path, truth_rollout=True, steps=2, max_completion_length=32)
        given |= {"rewards": {"letter": 1.0, "format": 1.0}, "watch_every": 2}
        folder = trained(tmp_path / "out", given | {"dynamic_sampling": dynamic_sampling})
    rows = shards.read(folder, "completions").to_pylist()
    assert all(row["completion"].startswith("<think>") for row in rows)
    for truth in rows[3::4]:
        assert truth["completion"].count("<think>") == 1
        assert truth["reward/letter"] == truth["reward/format"] == 1.0


RAISES = "{{ raise_exception('only text, please') }}"


def test_an_error_of_the_template_itself_is_its_sentence(tmp_path):
    says = "the policy's chat template refuses the question: only text, please; use a model"
    made = processor(start=RAISES)
    for refuses in (
        lambda: prompts.rendered(made, prompts.chat("?")),
        lambda: processors.check(made, []),
        lambda: supervised.collate(
            made, [sft_examples.Example(Image.new("RGB", (84, 84)), "?", "!")]
        ),
    ):
        with pytest.raises(StageError, match=says):
            refuses()
    made.save_pretrained(tmp_path)
    tiny_policy.config().save_pretrained(tmp_path)
    with pytest.raises(StageError, match=says):
        PromptBuilder(tmp_path)


def card(**changed) -> Card:
    facts = {"noun": "bird", "kind": "species", "classes": ("wren", "robin")} | changed
    return Card("birds", 1, source={"kind": "folder"}, **facts)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"classes": ("wren", "<|image_pad|>")},
            "data card birds: class '<|image_pad|>' holds <|image_pad|>",
        ),
        ({"classes": ("a <|im_end|> b", "wren")}, "class 'a <|im_end|> b' holds <|im_end|>"),
        ({"noun": "<|vision_start|>"}, "noun '<|vision_start|>' holds <|vision_start|>"),
        ({"kind": "<|endoftext|>"}, "kind '<|endoftext|>' holds"),
        ({"classes": ("wren", "</answer>")}, "class '</answer>' holds </answer>"),
        ({"classes": ("<think>hard", "wren")}, "class '<think>hard' holds <think>"),
    ],
)
def test_a_word_that_holds_a_mark_is_named_with_it(tmp_path, changed, says):
    made = tiny_policy.processor()
    made.save_pretrained(tmp_path)
    with pytest.raises(StageError) as caught:
        policies.check_words(policies.special_tokens(tmp_path), card(**changed))
    assert str(caught.value).startswith(says if "data card" in says else f"data card birds: {says}")
    with pytest.raises(StageError):
        processors.check(made, [card(), card(**changed)])


def test_plain_words_pass(tmp_path):
    tiny_policy.processor().save_pretrained(tmp_path)
    assert policies.special_tokens(tmp_path) == set(tiny_policy.SPECIAL)
    plain = ("im_end", "<3 birds", "image_pad", "A|B", "猫")
    policies.check_words(policies.special_tokens(tmp_path), card(classes=plain))
    policies.check_words(
        policies.special_tokens(tmp_path / "elsewhere"), card(classes=("<|im_end|>", "wren"))
    )


@pytest.fixture
def marked(split_set):
    """The `few` card with a class that the policy's tokenizer reads as the end of a turn."""
    import data_cards

    tiny_policy.processor().save_pretrained(split_set.root)
    path = data_cards.FOLDER / "few.md"
    name = split_set.card.classes[0]
    path.write_text(path.read_text().replace(name, f'"{name} <|im_end|>"', 1))
    assert data_cards.load("few").classes[0].endswith("<|im_end|>")
    return split_set


@pytest.mark.parametrize(
    ("stage", "arguments"), [(propose, propose_arguments), (evaluate, evaluate_arguments)]
)
def test_a_stage_refuses_it_before_its_first_shard(marked, stage, arguments):
    output = marked.root / "out"
    output.mkdir()
    with pytest.raises(StageError, match=r"data card few: class .* holds <\|im_end\|>, which the"):
        run_stage(stage, output, **arguments(marked))
    assert not list(output.iterdir())


def test_a_prediction_over_such_classes_is_refused(policy):
    from tasks.predict import Predictor

    tiny_policy.processor().save_pretrained(policy)
    with pytest.raises(StageError, match=r"class '<\|im_end\|>' holds"):
        Predictor(policy, classes=("<|im_end|>", "wren"), engine=asked_by(policy))
