"""Shared fixtures: a tiny drawn card, and stages run on it with an engine that needs no model."""

import configparser
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

import pytest
from hypothesis import HealthCheck, settings

import data_cards
from pipeline.parameters import parameter
from tasks.engines.settings import EngineSettings
from tasks.runtime.command import bind, settings_kind
from tasks.runtime.settings import Settings, plain, rules
from tasks.tables import schemas, shards

# A model as small as the tests' is slower on several threads, and test files run side by side. Read
# when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long one example takes says nothing where test files run side by side.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

S = TypeVar("S", bound=Settings)
ROOT = Path(__file__).parent.parent


LOSSES = ("dapo", "dr_grpo", "gspo", "cispo")  # recipes of a loss alone


def recipe_files(path: Path) -> list[Path]:
    """A recipe, and before it the one that it is meant to be read over."""
    below = {"paper_few_shot": "paper_7b", **dict.fromkeys(LOSSES, "one_gpu_lora")}
    return [path.with_stem(below[path.stem]), path] if path.stem in below else [path]


def settings_of(kind: type[S], **changed: Any) -> S:
    """A stage's settings as luigi.cfg has them, but for those given."""
    config = configparser.RawConfigParser()
    config.read(ROOT / "luigi.cfg")
    section = config[kind.section] if kind.section else {}
    found = {
        name: plain(parameter(of, rule).parse(section[name]))
        for name, (of, rule) in rules(kind).items()
        if name in section
    }
    return kind(**{**found, **changed})


ENGINE = settings_of(EngineSettings, backend="tests.fakes:engine")


def run_stage(function: Callable[..., None], output: Path, **values: Any) -> None:
    """A stage's function on values by name, as recipe.json has them; luigi.cfg has the other settings."""
    for name, kind in get_type_hints(function).items():
        if not settings_kind(kind) or isinstance(values.get(name), Settings):
            continue
        if name in values:
            values[name] = settings_of(kind, **values[name])
        else:
            own = {key: values.pop(key) for key in rules(kind) if key in values}
            values[name] = settings_of(kind, **own)
    function(**bind(function, {"output": output, **values}))


def write_few_card(folder: Path, counts: str = "{pretrain: 2, train: 3, val: 1, test: 2}") -> Path:
    """A folder with the card `few`, with so many images per class."""
    text = (ROOT / "tests" / "few.md").read_text()
    few, replaced = re.subn(r"images_per_class: \{.*?\}", f"images_per_class: {counts}", text)
    assert replaced == 1
    folder.mkdir(exist_ok=True)
    (folder / "few.md").write_text(few)
    return folder


@pytest.fixture
def few_beetles(tmp_path, monkeypatch) -> data_cards.Card:
    """A drawn card with a handful of images, found under the name `few`."""
    cards = write_few_card(tmp_path / "cards")
    monkeypatch.setattr(data_cards, "FOLDER", cards)
    return data_cards.load("few")


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory) -> Path:
    """Download and Split of the `few` card, made once for all tests; to be copied, not changed."""
    from tasks.download import download
    from tasks.split import split

    root = tmp_path_factory.mktemp("drawn")
    cards = write_few_card(root / "cards")
    (root / "download").mkdir()
    (root / "split").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cards, "FOLDER", cards)
        run_stage(download, root / "download", card="few", max_reject_share=0.0)
        run_stage(
            split,
            root / "split",
            card="few",
            download=root / "download",
            protocol="base_to_novel",
            test_share=0.2,
            val_share=0.1,
            pretrain_share=0.2,
            seed=0,
        )
    return root


@pytest.fixture
def split_set(tmp_path, few_beetles, drawn_once) -> SimpleNamespace:
    """Download and Split of the `few` card, as plain folders."""
    for name in ("download", "split"):
        shutil.copytree(drawn_once / name, tmp_path / name)
    return SimpleNamespace(
        card=few_beetles, download=tmp_path / "download", split=tmp_path / "split", root=tmp_path
    )


@pytest.fixture
def rollouts(split_set) -> SimpleNamespace:
    """`split_set` with a Propose artifact of 20 fake rollouts an image."""
    from tasks.propose import propose

    split_set.propose = split_set.root / "propose"
    split_set.propose.mkdir()
    run_stage(propose, split_set.propose, **propose_arguments(split_set))
    return split_set


def on(made: SimpleNamespace) -> dict:
    """What every stage on a `split_set` is given."""
    return {"card": "few", "download": made.download, "split": made.split, "seed": 0}


def propose_arguments(made: SimpleNamespace, **changed) -> dict:
    """Propose's keyword arguments on a `split_set`."""
    return {
        **on(made),
        "policy": made.root,
        "engine": ENGINE,
        "shard_size": 16,
        "fail_fast_unparsed_share": 1.0,
        "max_lost_share": 0.0,
    } | changed


def evaluate_arguments(made: SimpleNamespace, **changed) -> dict:
    """Evaluate's keyword arguments on a `split_set`."""
    return {
        **on(made),
        "policy": made.root,
        "engine": ENGINE,
        "modes": "one_step majority two_step",
        "shard_size": 16,
    } | changed


def mcq_arguments(made: SimpleNamespace, **changed) -> dict:
    """BuildMCQ's keyword arguments on a `rollouts` set."""
    return {
        **on(made),
        "propose": made.propose,
        "prompt_style": "brief",
        "num_options": 5,
        "top_up": "confusion",
        "min_options": 3,
        "vocabulary": "closed",
        "fuzzy_threshold": 0.0,
        "fuzzy_margin": 5.0,
        "options_from": "policy",
        "answer_from": "label",
        "min_truth_votes": 0,
        "max_unparsed_per_image": 1.0,
        "max_lost_share": 0.2,
        "shard_size": 25,
    } | changed


def write_rollouts(folder: Path, answers: dict[str, list[str]]) -> None:
    """A Propose artifact with given answers by image id."""
    rows = [
        {
            "image_id": image_id,
            "rollout": number,
            "completion": f"<think>?</think><answer>{answer}</answer>",
            "finish_reason": "stop",
            "num_tokens": 5,
            "mean_logprob": -0.5,
        }
        for image_id, given in sorted(answers.items())
        for number, answer in enumerate(given)
    ]
    folder.mkdir(exist_ok=True)
    shards.write(shards.shard_path(folder, "rollouts", 0), rows, schemas.rollouts())


def as_config(path: Path, arguments: dict) -> Path:
    """Keyword arguments as the JSON file that a stage's command reads."""
    plain = {k: v.values() if isinstance(v, Settings) else v for k, v in arguments.items()}
    path.write_text(json.dumps(plain, default=str))
    return path
