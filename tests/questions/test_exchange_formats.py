"""Exported questions are opened by their readers' own calls, and come back whole."""

import io
from pathlib import Path

import pytest
from PIL import Image

from tasks import exchange
from tasks.build_mcq import build_mcq
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import ROOT, mcq_arguments, on, run_stage
from tests.test_exchange import official  # noqa: F401  a fixture


@pytest.fixture
def asked(rollouts, tmp_path) -> tuple[Path, list[dict]]:
    """A folder of question shards, and its rows."""
    mcq = tmp_path / "mcq"
    mcq.mkdir()
    run_stage(build_mcq, mcq, **mcq_arguments(rollouts))
    return mcq, shards.read(mcq, "mcq").to_pylist()


def lines(question: str) -> list[str]:
    return [line[3:] for line in question.split("\n")[1:-1]]


def test_visual_rft_and_the_official_trainer_open_it_as_they_open_theirs(asked, tmp_path):
    from datasets import DatasetDict

    out = tmp_path / "out"
    assert exchange.export_questions(asked[0], "visual_rft", out) == len(asked[1]) > 0
    loaded = DatasetDict.load_from_disk(str(out))["train"]
    assert loaded.column_names == ["image", "problem", "solution"]
    assert not list(tmp_path.glob(".export-*"))
    for row, ours in zip(loaded, asked[1], strict=True):
        shown = Image.open(io.BytesIO(ours["image"]["bytes"]))
        assert row["image"].tobytes() == shown.tobytes(), "datasets decodes the image"
        assert lines(row["problem"]) == ours["options"]
        assert row["solution"] == f"<answer>{ours['answer_letter']}</answer>"
        assert "or name" in ours["question"]
        assert "the letter of one option between <answer>" in row["problem"]
        assert "or name" not in row["problem"]


@pytest.mark.parametrize("style", ["easyr1", "verl"])
def test_parquet_is_opened_by_its_readers_own_call(asked, tmp_path, style):
    from datasets import load_dataset

    out = tmp_path / "out"
    assert exchange.export_questions(asked[0], style, out) == len(asked[1])
    files = {"data_dir": str(out)}
    if style == "verl":
        files = {"data_files": [str(path) for path in sorted(out.glob("train-*.parquet"))]}
    loaded = load_dataset("parquet", **files, split="train", cache_dir=str(tmp_path / "c"))
    columns = {
        "easyr1": ["images", "problem", "answer"],
        "verl": ["data_source", "prompt", "images", "ability", "reward_model", "extra_info"],
    }
    assert loaded.column_names == columns[style]
    for number, (row, ours) in enumerate(zip(loaded, asked[1], strict=True)):
        assert row["images"][0].size == (84, 84)
        text = row["problem"] if style == "easyr1" else row["prompt"][0]["content"]
        assert text.startswith("<image>What species of beetle is this?\n")
        assert lines(text) == ours["options"]
        letter = row["answer"] if style == "easyr1" else row["reward_model"]["ground_truth"]
        assert letter == ours["answer_letter"]
        if style == "verl":
            assert row["extra_info"]["index"] == number


def test_verl_finds_the_reward_function_and_it_scores_what_was_exported(asked, tmp_path):
    """verl loads the file by its path, and calls the function with these names."""
    import importlib.util

    from datasets import load_dataset

    spec = importlib.util.spec_from_file_location("custom_module", ROOT / "tasks/verl_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exchange.export_questions(asked[0], "verl", tmp_path / "out")
    files = [str(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    row = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "c"))[0]
    given = {"data_source": row["data_source"], "extra_info": row["extra_info"]}
    given |= {"ground_truth": row["reward_model"]["ground_truth"]}
    truth = row["extra_info"]["options"][ord(given["ground_truth"]) - ord("A")]
    wrong = next(name for name in row["extra_info"]["options"] if name != truth)
    for text, score in [
        (f"<think>?</think><answer>{given['ground_truth']}</answer>", 2),
        (f"<think>?</think><answer>{truth}</answer>", 2),
        (f"<think>?</think><answer>{wrong}</answer>", 1),
        (f"<answer>{truth}</answer>", 1),
        ("no tags", 0),
    ]:
        assert module.compute_score(solution_str=text, **given) == score, text


@pytest.mark.parametrize("style", exchange.FORMATS)
def test_of_an_open_question_the_name_is_the_solution(split_set, tmp_path, style):
    from datasets import DatasetDict

    from tasks.build_open import build_open
    from tasks.verl_reward import compute_score

    folder, out = tmp_path / "open", tmp_path / "out"
    folder.mkdir()
    arguments = {**on(split_set), "prompt_style": "brief", "prompt": "open", "shard_size": 50}
    del arguments["seed"]
    build_open(folder, **arguments, seed=0)
    exchange.export_questions(folder, style, out)
    ours = shards.read(folder, "mcq").to_pylist()[0]
    if style == "visual_rft":
        row = DatasetDict.load_from_disk(str(out))["train"][0]
        assert (row["problem"], row["solution"]) == (
            ours["question"],
            f"<answer>{ours['options'][0]}</answer>",
        )
        return
    row = next(iter(shards.iter_rows(out, "train")))
    if style == "easyr1":
        assert row["answer"] == ours["options"][0]
        return
    text = f"<think>?</think><answer>{ours['options'][0].upper()}</answer>"
    truth = row["reward_model"]["ground_truth"]
    assert compute_score("few", text, truth, row["extra_info"]) == 2
    assert compute_score("few", text.replace("ans", "xns"), truth, row["extra_info"]) == 0
    assert compute_score("few", "<think>?</think><answer>A</answer>", truth, row["extra_info"]) == 1


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(StageError, match="visual_rft, easyr1, verl; got 'csv'"):
        exchange.export_questions(tmp_path, "csv", tmp_path / "out")


@pytest.mark.parametrize("style", exchange.FORMATS)
def test_files_of_an_earlier_export_or_import_never_stay_among_the_new(
    official, asked, few_beetles, tmp_path, style
):
    exchange.export_questions(asked[0], style, tmp_path / "out")
    with pytest.raises(StageError, match="out is not empty; delete it"):
        exchange.export_questions(asked[0], style, tmp_path / "out")
    with pytest.raises(StageError, match="out is not empty; delete it"):
        exchange.import_rollouts(official[0], few_beetles, tmp_path / "pictures", tmp_path / "out")
