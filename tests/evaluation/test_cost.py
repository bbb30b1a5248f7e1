"""What policies cost: completions, and the length of thoughts, counted from what is stored."""

import json
from pathlib import Path

import pytest

from tasks.compare import tabulate
from tasks.evaluate import evaluate
from tasks.evaluation.cost import mean_thoughts, thoughts
from tasks.language.answers import reasoning
from tasks.pages.compare_latex import latex
from tasks.pages.compare_page import compare_page
from tasks.pages.compare_tables import csv_table, markdown
from tasks.pages.report.tables import thought_table
from tasks.report import report
from tasks.tables import shards
from tests.conftest import evaluate_arguments, run_stage
from tests.test_compare import runs  # noqa: F401

MODES = "one_step majority two_step mcq constrained adaptive"


@pytest.fixture
def evaluated(split_set):
    split_set.folder = split_set.root / "evaluated"
    split_set.folder.mkdir()
    run_stage(evaluate, split_set.folder, **evaluate_arguments(split_set, modes=MODES))
    return split_set


def words(folder, table, most=None) -> dict[str, list[int]]:
    by_image: dict[str, list[int]] = {}
    for row in shards.read(folder, table).to_pylist():
        by_image.setdefault(row["image_id"], []).append(len(reasoning(row["completion"]).split()))
    return by_image


def test_thoughts_are_counted_by_mode_an_answer_and_an_image(evaluated):
    folder = evaluated.folder
    found = json.loads((folder / "stats.json").read_text())["thoughts"]
    assert found["unit"] == "words", "this policy has no tokenizer"
    assert list(found["modes"]) == MODES.split()
    sampled, images = words(folder, "rollouts"), len(words(folder, "one_step"))
    total = sum(map(sum, sampled.values()))
    for mode in ("one_step", "two_step", "mcq", "adaptive"):
        own = [count for counts in words(folder, mode).values() for count in counts]
        of_mode = found["modes"][mode]
        assert of_mode["answer"] == pytest.approx(sum(own) / len(own))
        before = 0 if mode == "one_step" else total
        if mode == "adaptive":
            rows = shards.read_file(folder / "adaptive_counts.parquet").to_pylist()
            before = sum(sum(sampled[r["image_id"]][: r["num_rollouts"]]) for r in rows)
            assert before < total
        assert of_mode["image"] == pytest.approx((sum(own) + before) / images)
    assert found["modes"]["majority"] == pytest.approx(
        {"answer": total / (20 * images), "image": total / images}
    )
    assert found["modes"]["constrained"] == pytest.approx({"answer": 0.0, "image": total / images})


def test_with_a_tokenizer_the_policys_own_tokens_are_counted_as_the_reward_counts_them(evaluated):
    from training.loop.session import Session
    from training.model import tiny_policy

    processor = tiny_policy.processor(["rose", "gold-belt"])
    processor.save_pretrained(evaluated.root)
    session = Session.__new__(Session)
    session.processor = processor
    images = list(words(evaluated.folder, "one_step"))
    found = thoughts(evaluated.folder, evaluated.root, images, ["one_step"])
    assert found["unit"] == "tokens"
    texts = shards.read(evaluated.folder, "one_step")["completion"].to_pylist()
    counts = [session.count_tokens(reasoning(text)) for text in texts]
    assert found["modes"]["one_step"]["answer"] == pytest.approx(sum(counts) / len(counts))
    assert sum(counts) > sum(len(reasoning(text).split()) for text in texts)


def run_of(made, method: str, seed: int, folder) -> dict:
    return {
        "set": "few", "trained_on": "few", "method": method, "round": None, "seed": seed,
        "evaluate": str(folder), "split": str(made.split),
        "propose": [], "build_mcq": [], "train": [],
    }  # fmt: skip


def test_a_comparison_shows_them_beside_the_accuracy_as_means_over_seeds(evaluated):
    stats = json.loads((evaluated.folder / "stats.json").read_text())
    stats["thoughts"] = {"unit": "tokens", "modes": {"one_step": {"answer": 3.0, "image": 3.0}}}
    (evaluated.folder / "stats.json").write_text(json.dumps(stats))
    other = evaluated.root / "other"
    other.mkdir()
    run_stage(evaluate, other, **evaluate_arguments(evaluated, modes=MODES))
    longer = {"unit": "tokens", "modes": {"one_step": {"answer": 8.0, "image": 8.0}}}
    (other / "stats.json").write_text(json.dumps({"thoughts": longer}))
    folders = {"zero_shot": [other, other], "dive_k": [evaluated.folder, other]}
    runs = [run_of(evaluated, m, s, f) for m, both in folders.items() for s, f in enumerate(both)]
    contents = tabulate(runs)
    (table,) = contents["sets"]
    assert table["thoughts"]["dive_k"]["modes"]["one_step"] == {"answer": 5.5, "image": 5.5}
    figures = table["modes"]["one_step"]["dive_k"]
    shares = [f"{100 * figures[k]['mean']:.1f}" for k in ("base", "novel", "harmonic_mean")]
    cells = ["DiVE-k", "one step", "5.5 tokens", "5.5 tokens", *shares]
    assert f"| {' | '.join(cells)} |" in markdown(contents)
    page = compare_page(contents)
    assert "How long it thinks" in page
    assert "<td>5.5 tokens</td>" in page
    assert f"{' & '.join(cells)} \\\\" in latex(contents)
    for key in ("answer", "image"):
        line = f"few,few,one_step,dive_k,thought_{key}_tokens,mean,5.5,"
        assert line in csv_table(contents)
    words_alone = {"unit": "words", "modes": longer["modes"]}
    (other / "stats.json").write_text(json.dumps({"thoughts": words_alone}))
    assert list(mean_thoughts(runs)) == ["zero_shot"], "units differ"
    (other / "stats.json").write_text("{}")  # an evaluation of before
    contents = tabulate(runs)
    assert contents["sets"][0]["thoughts"] == {}
    assert "How long it thinks" not in compare_page(contents) + markdown(contents) + latex(contents)
    assert "thought_" not in csv_table(contents)


def test_the_report_shows_them_and_leaves_out_what_an_older_evaluation_lacks(tmp_path, monkeypatch):
    from tests.test_report import build_tree

    monkeypatch.setattr("data_cards.FOLDER", tmp_path)
    monkeypatch.setattr("tasks.pages.figures.ZOOM", 0.25)
    tree = build_tree(tmp_path)
    report(tmp_path / "old", **tree)
    assert "How long it thinks" not in (tmp_path / "old/index.html").read_text()
    found = {"unit": "tokens", "modes": {"one_step": {"answer": 31.25, "image": 31.25}}}
    path = f"{tree['evaluations'][1]['path']}/stats.json"
    with open(path, "w") as file:
        json.dump({"thoughts": found}, file)
    report(tmp_path / "new", **tree)
    metrics = json.loads((tmp_path / "new/metrics.json").read_text())
    assert [e["thoughts"] for e in metrics["evaluations"]] == [{}, found]
    assert thought_table(metrics["evaluations"])[1:] == [
        ["DiVE-k", "one step", "31.2 tokens", "31.2 tokens", "80.0", "60.0", "68.6"]
    ]
    page = (tmp_path / "new/index.html").read_text()
    assert "How long it thinks" in page
    assert "<td>31.2 tokens</td>" in page


def test_completions_that_serve_several_steps_are_counted_once(runs):
    for run in runs:
        for folder in run["train"] if run["method"] == "virft" else []:
            path = Path(folder, "manifest.json")
            manifest = json.loads(path.read_text())
            manifest["settings"]["trl"] = {"num_iterations": 3}
            path.write_text(json.dumps(manifest))
    found = tabulate(runs)
    # Of 8 steps the first, the fourth and the seventh generate.
    assert found["budgets"]["toy"]["virft"]["questions_asked"] == 3 * 6
    assert found["budgets"]["toy"]["virft"]["completions"] == 3 * 6 * 4
    assert "completions on toy: virft 72, dive_k 192" in found["unequal"]
