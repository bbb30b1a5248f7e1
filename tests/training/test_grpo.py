"""The trainer, in this process: going on after a kill, rounds as one run, what is trained and logged.

An untrained tiny policy answers nothing, so it is paid by the length of its completions: every step
moves the weights, which is what makes equal weights mean something.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import data_cards
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ROOT, as_config, run_stage

pytestmark = pytest.mark.model
TWO_PROCESSES = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
    "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0",
]  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_of(policy: Path) -> str:
    """The digest of what a policy learned: an adapter, or all weights."""
    adapter = policy / "adapter" / "adapter_model.safetensors"
    return digest(adapter if adapter.exists() else policy / "model.safetensors")


def write_manifest(mcq: Path) -> None:
    """What Train checks the shards of questions against."""
    files = {p.name: {"sha256": shards.sha256_file(p)} for p in mcq.glob("*.parquet")}
    (mcq / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture(scope="module")
def frozen(drawn_once, tmp_path_factory):
    """Questions about the `few` card from fake rollouts, with a manifest, and an untrained policy."""
    root = tmp_path_factory.mktemp("frozen")
    for name in ("download", "split"):
        shutil.copytree(drawn_once / name, root / name)
    with cards_of(drawn_once):
        freeze(root)
        yield root


@contextlib.contextmanager
def cards_of(drawn: Path):
    """The card `few` is found under its name meanwhile."""
    import data_cards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cards, "FOLDER", drawn / "cards")
        yield


def freeze(root: Path) -> None:
    """Propose, BuildMCQ and a policy beside Download and Split of the `few` card."""
    import data_cards
    from tasks.build_mcq import build_mcq
    from tasks.propose import propose
    from tests.conftest import mcq_arguments, propose_arguments
    from training.model import tiny_policy

    place = type("Place", (), {"root": root, "download": root / "download"})()
    place.split, place.propose = root / "split", root / "propose"
    for name in ("propose", "mcq"):
        (root / name).mkdir()
    run_stage(propose, root / "propose", **propose_arguments(place))
    run_stage(build_mcq, root / "mcq", **mcq_arguments(place))
    write_manifest(root / "mcq")
    card = data_cards.load("few")
    words = tiny_policy.slot_words([card.kind, card.noun, *card.classes])
    tiny_policy.save(*tiny_policy.build(words, seed=3), root / "policy")


def arguments(frozen: Path, **changed) -> dict:
    """The trainer's keyword arguments: 4 steps of 2 questions, 4 completions each."""
    return {
        "card": "few",
        "method": "dive_k",
        "ask": "mcq",
        "truth_rollout": False,
        "mcq": [frozen / "mcq"],
        "download": [frozen / "download"],
        "split": [frozen / "split"],
        "base": frozen / "policy",
        "policy": frozen / "policy",
        "prompt_style": "brief",
        "dtype": "float32",
        "order": "shuffled",
        "freeze": "none",
        "lora_rank": 0,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "lora_targets": "language",
        "quantize": "none",
        "steps": 4,
        "rounds": 1,
        "questions_per_step": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "rewards": {"tests.paid:by_length": 1.0, "format": 1.0},
        "dynamic_sampling": 0,
        "watch_every": 0,
        "watch_images": 8,
        "keep_policy": "last",
        "carry_over": True,
        "trl": {"beta": 0.05, "use_cpu": True},
        "shared_prefix": True,
        "tokens_per_micro_batch": 0,
        "check_shared_prefix": True,
        "check_largest_batch": False,
        "micro_batch_size": 4,
        "save_steps": 1,
        "keep_checkpoints": 2,
        "check_memory": False,
        "report_to": "",
        "push_to_hub": "",
        "refresh_round": 0,
        "seed": 0,
    } | changed


def trained(output: Path, given: dict) -> Path:
    from training.grpo import grpo

    output.mkdir(exist_ok=True)
    run_stage(grpo, output, **given)
    return output


def curve(folder: Path) -> list[tuple]:
    rows = shards.read(folder, "train_log").to_pylist()
    return [(row["step"], row["loss"], row["reward"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module", params=["full", "lora"])
def unbroken(request, frozen, tmp_path_factory):
    """A run to its end, and what lay on the disk whenever a checkpoint had been completed."""
    from training.loop import checkpoints

    given = arguments(frozen)
    if request.param == "lora":
        given |= {"lora_rank": 4, "learning_rate": 1e-2, "lora_dropout": 0.1}
    root = tmp_path_factory.mktemp(request.param)
    output, marked = root / "unbroken", checkpoints.mark_complete

    def mark(folder: Path) -> None:
        marked(folder)
        shutil.copytree(output, root / f"killed-{folder.name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "mark_complete", mark)
        trained(output, given)
    return root, given


def test_killed_at_any_checkpoint_a_run_ends_as_if_nothing_had_been(unbroken):
    root, given = unbroken
    whole = root / "unbroken"
    assert len({loss for _, loss, *_ in curve(whole)}) == 4, "something is learned"
    assert weights_of(whole) != weights_of(given["base"])
    killed = sorted(root.glob("killed-*"))
    assert [path.name for path in killed] == [f"killed-checkpoint-{n}" for n in (1, 2, 3, 4)]
    for path in killed:
        torn = path / "checkpoints" / "checkpoint-9"  # begun, and never completed
        torn.mkdir()
        (torn / "trainer_state.json").write_text('{"global_step": 9')
        trained(path, given)
        assert curve(path) == curve(whole), path.name
        assert weights_of(path) == weights_of(whole), path.name
        texts = [shards.read(folder, "completions")["completion"] for folder in (path, whole)]
        assert texts[0] == texts[1]


def test_a_batch_decodes_a_picture_once_at_the_size_that_the_policy_takes(
    frozen, tmp_path, monkeypatch
):
    from tasks.tables.pixels import Decoder
    from training.model import tiny_policy

    card = data_cards.load("few")
    words = tiny_policy.slot_words([card.kind, card.noun, *card.classes])
    small = {"min_pixels": 28**2, "max_pixels": 56**2}
    tiny_policy.save(*tiny_policy.build(words, seed=3, **small), tmp_path / "policy")
    made, decode = [], Decoder.__call__

    def noted(self, data):
        made.append(decode(self, data))
        return made[-1]

    monkeypatch.setattr(Decoder, "__call__", noted)
    own = {"base": tmp_path / "policy", "policy": tmp_path / "policy", "watch_every": 3}
    trl = {"beta": 0.0, "use_cpu": True, "steps_per_generation": 2}
    given = arguments(frozen, steps=3, watch_images=4, micro_batch_size=4, trl=trl, **own)
    folder = trained(tmp_path / "out", given)
    asked = set(shards.read(folder, "completions")["mcq_id"].to_pylist())
    assert len(asked) == 6
    # Each was looked at before, to tell what memory it takes; and 4 val images.
    assert len(made) == 6 + len(asked) + 4
    assert {picture.size for picture in made} == {(56, 56)}


def test_rounds_on_unchanged_shards_are_one_run(frozen, tmp_path, unbroken):
    _, given = unbroken
    given = {**given, "trl": {**given["trl"], "lr_scheduler_type": "cosine"}}
    one = trained(tmp_path / "one", given)
    first = trained(tmp_path / "first", {**given, "steps": 2, "rounds": 2})
    second = trained(
        tmp_path / "second",
        {**given, "steps": 2, "rounds": 2, "refresh_round": 1, "policy": first},
    )
    assert curve(first) + curve(second) == curve(one)
    assert weights_of(second) == weights_of(one)
    assert {p.suffix for p in (first / "state").iterdir()} == {".json", ".safetensors"}
    asked = [shards.read(f, "completions")["mcq_id"].to_pylist() for f in (first, second, one)]
    assert asked[0] + asked[1] == asked[2]


def test_a_round_that_kept_no_state_is_told(frozen, tmp_path):
    given = arguments(frozen, rounds=2, refresh_round=1)
    with pytest.raises(StageError, match="kept no training state to go on from"):
        trained(tmp_path / "second", given)


def test_without_carry_over_a_round_starts_afresh_but_asks_further(frozen, tmp_path):
    given = arguments(frozen, steps=2, rounds=2, carry_over=False)
    first = trained(tmp_path / "first", given)
    second = trained(tmp_path / "second", {**given, "refresh_round": 1, "policy": first})
    assert [row[0] for row in curve(second)] == [1, 2]
    assert not (second / "state").exists()
    asked = [set(shards.read(f, "completions")["mcq_id"].to_pylist()) for f in (first, second)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({"freeze": "vision"}, {"projector", "language"}),
        ({"freeze": "language"}, {"vision", "projector"}),
        ({"freeze": "vision, projector"}, {"language"}),
    ],
)
def test_a_frozen_part_stays_as_it_is(frozen, tmp_path, capsys, changed, moves):
    from safetensors.torch import load_file

    from training.model.tiny_policy import new_model
    from training.model.trainable import part_of

    folder = trained(tmp_path / "out", arguments(frozen, steps=1, **changed))
    before = load_file(frozen / "policy" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    moved = {name for name in before if not (before[name] == after[name]).all()}
    parts = set()
    for name, part in part_of(new_model(0)).items():
        # saved under older names, without the first "model."
        if any(
            saved.endswith(name.removeprefix("model.").removeprefix("language_model."))
            for saved in moved
        ):
            parts.add(part)
    assert parts == moves
    assert " 0 of " in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_adapters_over_quantised_weights_move_at_a_small_rate(
    frozen, tmp_path, monkeypatch, capsys, method
):
    import torch
    from safetensors.torch import load_file

    from training.grpo import grpo
    from training.model import loading, trainable
    from training.sft_baseline import sft_baseline

    def quantised(base, settings):
        model, adapters = loaded(base, replace(settings, quantize="none"))
        model.is_loaded_in_4bit = True  # all that TRL looks at
        model.num_parameters = lambda **_: 0  # for which bitsandbytes would be asked
        return model, adapters

    def moved(name: str) -> float:
        """The share of the adapters' first matrices that left bfloat16, where they began."""
        output = tmp_path / name
        output.mkdir()
        run_stage({"grpo": grpo, "sft": sft_baseline}[method], output, **given)
        weights = load_file(output / "adapter" / "adapter_model.safetensors")
        first = torch.cat([w.flatten() for key, w in weights.items() if "lora_A" in key])
        return (first.float() != first.bfloat16().float()).float().mean().item()

    loaded = loading.load_model
    monkeypatch.setattr(loading, "load_model", quantised)
    given = arguments(frozen, steps=2, lora_rank=4, learning_rate=1e-5, dtype="bfloat16")
    given |= {"quantize": "nf4"}
    assert moved("ours") > 0.9
    assert "full weights made of this policy are the unquantised base" in capsys.readouterr().out
    monkeypatch.setattr(trainable, "hold_in_float32", lambda model: None)
    assert moved("TRL's") == 0.0


def test_the_log_tells_parts_times_and_dead_groups(frozen, tmp_path):
    given = arguments(frozen, rewards={"tests.paid:equal": 0.5, "letter": 1.0}, steps=2)
    folder = trained(tmp_path / "out", given)
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["reward/tests.paid:equal"] == 1.0
        assert row["reward"] == pytest.approx(0.5 + row["reward/letter"])
        assert row["dead_group_share"] == 1.0
        assert row["advantage_spread"] == 0.0
        parts = [row[f"seconds_{what}"] for what in ("generation", "reward", "update")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(row["seconds"], rel=1e-3)
        assert row["tokens_per_second"] > 0
        assert 1 <= row["completion_length"] <= 8
    rows = shards.read(folder, "completions").to_pylist()
    assert len(rows) == 2 * 2 * 4
    assert {row["image_id"].split("/")[0] for row in rows} == {"few"}
    stats = json.loads((folder / "stats.json").read_text())
    assert stats["dead_group_share"] == 1.0
    assert stats["steps"] == [1, 2]


def test_a_reward_that_fails_is_told_once_and_counts_nothing(frozen, tmp_path, capsys):
    given = arguments(
        frozen, rewards={"tests.paid:broken": 1.0, "tests.paid:by_length": 1.0}, steps=2
    )
    folder = trained(tmp_path / "out", given)
    told = capsys.readouterr().err
    assert told.count("reward tests.paid:broken failed") == 1
    assert "colour" in told
    for row in shards.read(folder, "train_log").to_pylist():
        assert row["reward/tests.paid:broken"] is None
        assert row["reward"] == pytest.approx(row["reward/tests.paid:by_length"], abs=1e-6)


def test_groups_without_a_gradient_are_replaced_by_further_questions(frozen, tmp_path):
    asked, before = {}, 1.0
    for attempts in (0, 3):
        given = arguments(frozen, dynamic_sampling=attempts, steps=2)
        given["rewards"] = {"tests.paid:on_some_questions": 1.0}
        folder = trained(tmp_path / f"{attempts}", given)
        log = shards.read(folder, "train_log").to_pylist()
        asked[attempts] = shards.read(folder, "completions")["mcq_id"].to_pylist()
        replaced = [row["replaced_group_share"] for row in log]
        dead = np.mean([row["dead_group_share"] for row in log])
        if attempts:
            assert np.mean(replaced) > 0
            assert dead < before
        else:
            assert replaced == [None, None]
            before = dead
            assert before > 0
    assert asked[0] != asked[3]
    again = trained(tmp_path / "again", {**given})
    assert shards.read(again, "completions")["mcq_id"].to_pylist() == asked[3]


def test_looking_for_further_questions_makes_each_image_ready_once(frozen, tmp_path, monkeypatch):
    from training.loop.sampling import DynamicSampling
    from training.model.processors import load_processor
    from training.shared_prefix.prompts_once import _digest, _flat

    kind = type(load_processor(frozen / "policy").image_processor)
    ready, own, batch = [], kind.__call__, DynamicSampling._with_further
    batches = []

    def call(self, images, *arguments, **named):
        ready.extend(map(_digest, _flat(images)))
        return own(self, images, *arguments, **named)

    def further(self, inputs):
        before = len(ready)
        made = batch(self, inputs)
        batches.append(ready[before:])
        return made

    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(DynamicSampling, "_with_further", further)
    given = arguments(frozen, dynamic_sampling=3, steps=2, check_shared_prefix=False)
    given["rewards"] = {"tests.paid:on_some_questions": 1.0}
    folder = trained(tmp_path / "out", given)
    log = shards.read(folder, "train_log").to_pylist()
    assert any(row["replaced_group_share"] for row in log)
    assert len(batches) == 2
    for made in batches:
        assert len(made) == len(set(made)) > 0


def test_the_truth_can_be_one_of_every_groups_completions(frozen, tmp_path):
    from tasks.language.answers import choose

    given = arguments(frozen, truth_rollout=True, steps=2, rewards={"letter": 1.0, "format": 1.0})
    folder = trained(tmp_path / "out", {**given, "max_completion_length": 32})
    rows = shards.read(folder, "completions").to_pylist()
    for start in range(0, len(rows), 4):
        *_, truth = group = rows[start : start + 4]
        assert len({row["mcq_id"] for row in group}) == 1
        assert truth["reward/letter"] == truth["reward/format"] == 1.0
        assert truth["advantage"] > 0
        assert choose(truth["completion"], ["x", "y"]).index is None or truth["completion"]


def test_val_images_are_watched_and_the_best_policy_is_kept(frozen, tmp_path, monkeypatch):
    from training.loop.validation import Watch

    seen = iter([0.2, 0.5, 0.3, 0.4] * 2)
    monkeypatch.setattr(Watch, "_answers", lambda self, trainer, model, part: self.fake(part))
    share = {"now": 0.0}

    def fake(self, part):
        if part[0] is self.samples[0]:
            share["now"] = next(seen)
        right = round(share["now"] * len(part))
        names = [self.cards_names[s.label] for s in part]
        return [
            f"<think>x</think><answer>{n if i < right else 'x'}</answer>"
            for i, n in enumerate(names)
        ]

    import data_cards

    monkeypatch.setattr(Watch, "fake", fake, raising=False)
    monkeypatch.setattr(Watch, "cards_names", data_cards.load("few").classes, raising=False)
    weights = {}
    for keep in ("last", "best"):
        given = arguments(frozen, watch_every=1, watch_images=10, keep_policy=keep)
        folder = trained(tmp_path / keep, given)
        log = shards.read(folder, "train_log").to_pylist()
        assert [row["val_accuracy"] for row in log] == pytest.approx(
            [0.2, 0.5, 0.3, 0.4], abs=0.051
        )
        other = {"last": "best", "best": "last"}[keep]
        weights[keep] = digest(folder / "model.safetensors")
        weights[f"{keep}'s {other}"] = digest(folder / other / "model.safetensors")
        stats = json.loads((folder / "stats.json").read_text())
        assert stats["policy_step"] == {"last": 4, "best": 2}[keep]
    assert weights["last"] == weights["best's last"] != weights["best"] == weights["last's best"]


def test_the_card_names_what_it_came_from_and_no_path(frozen, tmp_path):
    from huggingface_hub import ModelCard

    folder = trained(tmp_path / "out", arguments(frozen, steps=1))
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    text = (folder / "README.md").read_text()
    assert "cc0-1.0" in text
    assert "dive_k" in text
    assert str(tmp_path) not in text
    assert str(frozen) not in text


def test_supervised_training_learns_the_truth_and_resumes(frozen, tmp_path, monkeypatch):
    from training.loop import checkpoints
    from training.sft_baseline import sft_baseline

    marked = checkpoints.mark_complete

    def mark(folder: Path) -> None:
        marked(folder)
        if folder.name == "checkpoint-3":
            shutil.copytree(tmp_path / "out", tmp_path / "killed")

    monkeypatch.setattr(checkpoints, "mark_complete", mark)

    given = arguments(frozen, method="sft", learning_rate=3e-3, steps=6, questions_per_step=8)
    given |= {"micro_batch_size": 8, "save_steps": 3, "watch_every": 3}
    (tmp_path / "out").mkdir()
    run_stage(sft_baseline, tmp_path / "out", **given)
    log = shards.read(tmp_path / "out", "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert log[2]["val_accuracy"] is not None
    run_stage(sft_baseline, tmp_path / "killed", **given)
    again = shards.read(tmp_path / "killed", "train_log").to_pylist()
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    weights = [digest(tmp_path / name / "model.safetensors") for name in ("out", "killed")]
    assert weights[0] == weights[1]


def test_in_bfloat16_small_steps_are_not_lost_and_rounds_still_one_run(frozen, tmp_path):
    import torch
    from safetensors.torch import load_file

    given = arguments(frozen, dtype="bfloat16", learning_rate=1e-6, save_steps=2)
    one = trained(tmp_path / "one", given)
    first = trained(tmp_path / "first", {**given, "steps": 2, "rounds": 2})
    rest = {"steps": 2, "rounds": 2, "refresh_round": 1, "policy": first}
    second = trained(tmp_path / "second", {**given, **rest})
    assert digest(second / "model.safetensors") == digest(one / "model.safetensors")
    weights = load_file(one / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    held = load_file(one / "state" / "weights" / "model.safetensors")
    before = load_file(frozen / "policy" / "model.safetensors")
    moved = [float((held[n] != before[n]).float().mean()) for n in held if held[n].ndim == 2]
    assert np.mean(moved) > 0.9
    assert json.loads((one / "config.json").read_text())["dtype"] == "bfloat16"


def test_completions_used_twice_are_logged_once_and_every_step_has_a_row(frozen, tmp_path):
    options = {"beta": 0.0, "use_cpu": True, "num_iterations": 2}
    given = arguments(frozen, trl=options, save_steps=2, watch_every=2)
    folder = trained(tmp_path / "out", given)
    log = shards.read(folder, "train_log").to_pylist()
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert [row["val_accuracy"] is not None for row in log] == [False, True, False, True]
    steps = shards.read(folder, "completions")["step"].to_pylist()
    assert steps == [1] * 8 + [3] * 8
    with pytest.raises(StageError, match="save_steps = 1 ends between"):
        trained(tmp_path / "other", {**given, "save_steps": 1})


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"trl": {"use_cpu": True, "logging_steps": 5}}, "'logging_steps' is set by another key"),
        ({"trl": {"use_cpu": True, "bets": 0.1}}, "GRPOConfig has no option 'bets'"),
        ({"micro_batch_size": 3}, "must be a multiple of micro_batch_size x processes = 3 x 1"),
        ({"micro_batch_size": 2, "dynamic_sampling": 1, "questions_per_step": 1, "num_generations": 4,
          "trl": {"use_cpu": True}}, None),
        ({"keep_policy": "best"}, "keep_policy = best needs watch_every"),
        ({"keep_policy": "worst"}, "must be last or best"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16; got 'float16'"),
        ({"order": "curriculum", "ask": "open"}, "curriculum needs candidates"),
        ({"rewards": {"difficulty_weighted": 1.0}}, "divided away again"),
        ({"check_memory": True, "dtype": "bfloat16", "lora_rank": 4, "freeze": "vision"}, "lora_targets says"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_training(frozen, tmp_path, changed, why):
    if why is None:
        trained(tmp_path / "out", arguments(frozen, steps=1, **changed))
        return
    with pytest.raises(StageError, match=why):
        trained(tmp_path / "out", arguments(frozen, **changed))


def test_two_processes_compute_what_one_does(frozen, tmp_path, drawn_once, monkeypatch):
    from safetensors.torch import load_file

    from tests import two_processes
    from training.loop import sampling

    def given(name: str) -> dict:
        # Adam would blow rounding up to steps of its own where a gradient is nearly zero.
        options = {"beta": 0.05, "use_cpu": True, "max_grad_norm": 0.0, "optim": "sgd"}
        return arguments(frozen, output=tmp_path / name, steps=2, watch_every=2, trl=options)

    monkeypatch.setattr(sampling, "Timed", two_processes.FixedTimed)
    one = given("one")
    trained(one.pop("output"), one)
    config = as_config(tmp_path / "two.json", given("two"))
    shutil.copytree(drawn_once / "cards", tmp_path / "cards")
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "tests.two_processes", str(config)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [shards.read(tmp_path / name, "train_log").to_pylist() for name in ("one", "two")]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert logs[0][0]["loss"] != 0
    for row, other in zip(*logs, strict=True):
        # Not the logged KL: TRL averages it over micro-batches, however many tokens each has.
        for key in ("loss", "reward", "dead_group_share", "completion_length"):
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        assert row["val_accuracy"] == other["val_accuracy"]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name


def test_two_processes_that_were_killed_end_as_if_nothing_had_been(frozen, tmp_path, drawn_once):
    """Each process's random numbers, and with them its completions, go on where they were.

    The launcher gives its processes a group of their own: they end when they find it gone.
    """
    shutil.copytree(drawn_once / "cards", tmp_path / "cards")

    def start(name: str) -> subprocess.Popen:
        config = as_config(
            tmp_path / f"{name}.json", arguments(frozen, output=tmp_path / name, steps=6)
        )
        return subprocess.Popen(
            [*TWO_PROCESSES, "-m", "training.grpo", str(config)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DIVE_PARENT": str(os.getpid())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    killed = start("killed")
    complete = tmp_path / "killed" / "checkpoints" / "checkpoint-1" / "complete"
    while not complete.exists() and killed.poll() is None:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(killed.pid, signal.SIGKILL)
    _, told = killed.communicate()  # to the end of all that write there
    assert complete.exists(), told[-3000:]
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "killed too late to tell"
    for name in ("killed", "unbroken"):
        run = start(name)
        _, told = run.communicate()
        assert run.returncode == 0, told[-3000:]
    folders = [tmp_path / name for name in ("killed", "unbroken")]
    assert curve(folders[0]) == curve(folders[1])
    weights = [digest(folder / "model.safetensors") for folder in folders]
    assert weights[0] == weights[1] != digest(frozen / "policy" / "model.safetensors")


def test_open_questions_are_trained_on_by_exact_match_and_in_captions(frozen, tmp_path, drawn_once):
    from tasks.build_open import build_open

    mcq = tmp_path / "open"
    mcq.mkdir()
    place = {"card": "few", "download": frozen / "download", "split": frozen / "split"}
    run_stage(
        build_open, mcq, **place, prompt="open", prompt_style="caption", shard_size=100, seed=0
    )
    write_manifest(mcq)
    rewards = {"caption_format": 1.0, "exact": 1.0, "virft_compat": 1.0, "overlong": 0.5}
    given = arguments(frozen, ask="open", mcq=[mcq], rewards=rewards, steps=1)
    folder = trained(tmp_path / "out", given)
    (row,) = shards.read(folder, "train_log").to_pylist()
    assert all(row[f"reward/{name}"] is not None for name in rewards)
    assert row["reward/exact"] == 0.0
    assert -1.0 <= row["reward/overlong"] <= 0.0
