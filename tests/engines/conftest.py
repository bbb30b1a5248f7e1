"""What the tests of real engines share: a tiny policy, and settings to ask it."""

from types import SimpleNamespace

import pytest

import data_cards
from tasks.download import download
from tasks.engines.settings import EngineSettings
from tasks.engines.worker import Query
from tasks.language import prompts
from tasks.split import split
from tasks.tables.split_table import select
from tests.conftest import run_stage, settings_of, write_few_card

SETTINGS = settings_of(
    EngineSettings, max_new_tokens=24, max_model_len=768, max_num_seqs=64,
    gpu_memory_utilization=0.3, server_concurrency=16, server_timeout=60.0, seeds="engine",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A drawn set and a tiny policy that has learned a little, so that its answers are decided."""
    from training.sft import base_policy

    root = tmp_path_factory.mktemp("backends")
    write_few_card(root / "cards", "{pretrain: 20, train: 2, val: 1, test: 1}")
    for name in ("download", "split", "policy"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(data_cards, "FOLDER", root / "cards")
        run_stage(download, root / "download", card="few", max_reject_share=0.0)
        run_stage(split, 
            root / "split", card="few", download=root / "download", protocol="base_to_novel",
            test_share=0.2, val_share=0.1, pretrain_share=0.2, seed=0,
        )  # fmt: skip
        run_stage(base_policy, 
            root / "policy", model="tiny", download=[root / "download"], split=[root / "split"],
            card="few", seed=0, prompt_style="brief", steps=60, batch_size=32, learning_rate=0.003,
            muon_learning_rate=0.02, question_share=0.5, blind_share=0.5, min_pixels=7056,
            max_pixels=7056, dtype="float32",
        )  # fmt: skip
        yield SimpleNamespace(
            root=root, download=root / "download", split=root / "split", policy=root / "policy"
        )


def queries(tiny, count: int = 20) -> list[Query]:
    question = prompts.open_question("beetle", "species")
    rows = select(tiny.split, "train", ("base",))[:count]
    return [Query(row["image_id"], question) for row in rows]
