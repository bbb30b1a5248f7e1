"""An image that the policy's processor refuses is named with its ratio, counted, and left out."""

import io
from dataclasses import replace

import pytest
from PIL import Image

from tasks.build_open import build_open
from tasks.engines.base import Request
from tasks.evaluate import evaluate
from tasks.evaluation.settings import PredictSettings
from tasks.predict import Predictor
from tasks.propose import propose
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tasks.tables.pixels import Decoder
from tasks.tables.split_table import select
from tests.conftest import ENGINE, evaluate_arguments, propose_arguments, run_stage
from tests.fakes import FakeEngine
from tests.photographs import replaced
from tests.test_predict import asked_by, picture, policy  # noqa: F401
from training.data.dataset import Questions
from training.data.refused import left_out
from training.model import tiny_policy

SAYS = "refuses 3000 x 10 pixels, 300 to 1: absolute aspect ratio must be smaller than 200"


class Looking(FakeEngine):
    """A fake engine that decodes pictures for the tiny policy's processor, as the real ones do."""

    def __init__(self, policy, settings):
        super().__init__(policy, settings)
        self.decode = Decoder(tiny_policy.processor())

    def check(self, request: Request) -> None:
        assert request.picture

    def generate(self, requests, sampling):
        assert all(request.picture for request in requests)
        if requests[0].key.isdigit():  # of predict
            return [[self._answer(replace(r, key=f"x/y/{r.key} gold-belt/z"), i, sampling)
                     for i in range(sampling.n)] for r in requests]  # fmt: skip
        return super().generate(requests, sampling)


def looking(policy, settings) -> Looking:
    return Looking(policy, settings)


LOOKS = replace(ENGINE, backend="tests.test_elongated:looking")


def strip() -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (3000, 10), "red").save(made, "PNG")
    return made.getvalue()


@pytest.fixture
def elongated(split_set):
    """The `few` card with one strip in each part; `names` are their image ids."""
    parts = {
        "train": select(split_set.split, "train", ("base",)),
        "test": select(split_set.split, "test", ("base",)),
        "val": select(split_set.split, "val", ("base",)),
        "pretrain": select(split_set.split, "pretrain", ("base", "novel")),
    }
    split_set.names = {part: rows[0]["image_id"] for part, rows in parts.items()}
    before, split_set.download = split_set.download, split_set.root / "strips"
    split_set.download.mkdir()
    replaced(
        before,
        split_set.download,
        list(split_set.card.classes),
        lambda _, image_id, data: strip() if image_id in split_set.names.values() else data,
    )
    return split_set


def the_refused(folder, table: str) -> dict[str, str]:
    rows = shards.read(folder, f"{table}_refused").to_pylist()
    return {row["image_id"]: row["reason"] for row in rows}


def test_propose_names_it_and_goes_on_as_max_lost_share_allows(elongated, capsys):
    output = elongated.root / "p"
    output.mkdir()
    arguments = propose_arguments(elongated, engine=LOOKS, max_lost_share=0.02)
    run_stage(propose, output, **arguments)
    refused = the_refused(output, "rollouts")
    assert list(refused) == [elongated.names["train"]]
    assert SAYS in refused[elongated.names["train"]]
    assert SAYS in capsys.readouterr().out
    with pytest.raises(StageError, match=f"refused 1 of 60 images .*{SAYS}"):
        run_stage(propose, output, **{**arguments, "max_lost_share": 0.0})


def test_evaluate_counts_it_as_wrong_in_every_mode(elongated):
    output = elongated.root / "e"
    output.mkdir()
    run_stage(evaluate, output, **evaluate_arguments(elongated, engine=LOOKS))
    for table in ("one_step", "rollouts"):
        assert SAYS in the_refused(output, table)[elongated.names["test"]]
    rows = shards.read(output, "predictions").to_pylist()
    own = [row for row in rows if row["image_id"] == elongated.names["test"]]
    assert len(own) == 3
    assert not any(row["correct"] for row in own)
    assert any(row["correct"] for row in rows)


def test_an_engine_that_takes_no_image_is_told_with_the_reason(elongated):
    replaced(elongated.root / "download", elongated.download, list(elongated.card.classes),
             lambda *_: strip())  # fmt: skip
    output = elongated.root / "p"
    output.mkdir()
    with pytest.raises(StageError, match=f"refuses the 8 largest images: few/.*{SAYS}"):
        run_stage(propose, output, **propose_arguments(elongated, engine=LOOKS))


def test_a_prediction_of_it_is_refused_also_as_the_first(policy):

    engine = asked_by(policy, backend="tests.test_elongated:looking")
    settings = PredictSettings(num_rollouts=4)
    names = ("0 gold-belt", "1 gold-belt")
    with Predictor(policy, classes=names, engine=engine, settings=settings) as ours:
        first, second = ours.predict([strip(), picture(1)])
    assert first.status == "refused"
    assert SAYS in first.error
    assert not second.error
    assert second.num_rollouts == 4


@pytest.fixture
def open_questions(elongated):
    folder = elongated.root / "mcq"
    folder.mkdir()
    run_stage(build_open, folder, card="few", download=elongated.download, split=elongated.split,
              prompt="open", prompt_style="brief", shard_size=25, seed=0)  # fmt: skip
    return folder


def test_training_has_no_question_about_it(elongated, open_questions, capsys):
    decode = Decoder(tiny_policy.processor())
    whole = Questions([open_questions], [elongated.card], None, seed=0)
    ours = Questions([open_questions], [elongated.card], None, seed=0, decode=decode)
    assert list(ours.refused) == [elongated.names["train"]]
    assert ours.image_ids == [i for i in whole.image_ids if i != elongated.names["train"]]
    assert len(ours.encoded) == len(ours.frozen) == len(ours.sizes) == 59
    assert [row["image_id"] for row in ours.rows(59)] != []
    left_out(ours.refused, 60, "questions", "train")
    assert (
        f"train: 1 of 60 questions cannot be shown to the policy: {elongated.names['train']}: "
        in (said := capsys.readouterr().out)
    )
    assert SAYS in said


@pytest.mark.parametrize(("refused", "total", "refuses"), [(1, 10, False), (2, 10, True), (2, 100, False),
                                                           (3, 100, True), (1, 1, True)])  # fmt: skip
def test_training_refuses_a_set_with_many_of_them(refused, total, refuses):
    reasons = dict.fromkeys(map(str, range(refused)), SAYS)
    if not refuses:
        left_out(reasons, total, "questions", "train")
        return
    with pytest.raises(
        StageError, match=f"{refused} of {total} questions cannot be shown .*{SAYS}"
    ):
        left_out(reasons, total, "questions", "train")


@pytest.mark.model
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_trainer_and_the_watched_val_images_go_on_without_it(
    elongated, open_questions, capsys, shared_prefix
):
    from tests.training.test_grpo import arguments, trained, write_manifest

    write_manifest(open_questions)
    card = elongated.card
    words = tiny_policy.slot_words([card.kind, card.noun, *card.classes])
    tiny_policy.save(*tiny_policy.build(words, seed=3), elongated.root / "policy")
    given = arguments(elongated.root, method="virft", ask="open", steps=4, questions_per_step=15)
    given |= {"mcq": [open_questions], "download": [elongated.download], "watch_every": 4}
    given |= {"micro_batch_size": 60, "watch_images": 100, "shared_prefix": shared_prefix}
    folder = trained(elongated.root / "out", given)
    said = capsys.readouterr().out
    assert f"questions cannot be shown to the policy: {elongated.names['train']}" in said
    assert f"val images cannot be shown to the policy: {elongated.names['val']}" in said
    asked = set(shards.read(folder, "completions")["image_id"].to_pylist())
    assert len(asked) == 59, "an epoch"
    assert shards.read(folder, "train_log")["val_accuracy"][-1].as_py() is not None


@pytest.mark.model
def test_the_base_policy_is_taught_without_it(elongated, capsys):
    from training.sft import base_policy

    given = {
        "model": "tiny", "download": [elongated.download], "split": [elongated.split], "card": "few",
        "prompt_style": "brief", "seed": 0, "steps": 3, "batch_size": 8, "learning_rate": 0.01,
        "muon_learning_rate": 0.0, "question_share": 0.5, "blind_share": 0.5, "min_pixels": 7056,
        "max_pixels": 7056, "dtype": "float32",
    }  # fmt: skip
    (elongated.root / "policy").mkdir()
    run_stage(base_policy, elongated.root / "policy", **given)
    said = capsys.readouterr().out
    assert (
        f"base_policy: 1 of 80 images cannot be shown to the policy: {elongated.names['pretrain']}"
        in said
    )


@pytest.mark.model
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_real_engine_starts_and_names_it(elongated, backend):
    card = elongated.card
    words = tiny_policy.slot_words([card.kind, card.noun, *card.classes])
    tiny_policy.save(*tiny_policy.build(words, seed=3), elongated.root / "policy")
    output = elongated.root / "e"
    output.mkdir()
    engine = replace(ENGINE, backend=backend, max_new_tokens=4, max_num_seqs=64)
    given = evaluate_arguments(elongated, engine=engine, modes="one_step", limit=20)
    run_stage(evaluate, output, **given | {"policy": elongated.root / "policy"})
    refused = the_refused(output, "one_step")
    assert list(refused) == [elongated.names["test"]]
    assert SAYS in refused[elongated.names["test"]]
