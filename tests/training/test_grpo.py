"""The trainer, in this process: going on after a kill, rounds as one run, what is trained and logged.

An untrained tiny policy answers nothing, so it is paid by the length of its completions: every step
moves the weights, which is what makes equal weights mean something.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import data_cards
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage

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
    # The largest one is looked at before, to tell what memory it takes; and 4 val images.
    assert len(made) == 1 + len(asked) + 4
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
    rewards["think_length"] = 1.0
    given = arguments(frozen, ask="open", mcq=[mcq], rewards=rewards, steps=1)
    folder = trained(tmp_path / "out", given)
    (row,) = shards.read(folder, "train_log").to_pylist()
    assert all(row[f"reward/{name}"] is not None for name in rewards)
    assert row["reward/exact"] == row["reward/think_length"] == 0.0
    assert -1.0 <= row["reward/overlong"] <= 0.0
