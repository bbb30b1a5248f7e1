"""The page of questions: right counts, everything escaped, filters that work in a real browser."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from pipeline.__main__ import main as command
from tasks.build_mcq import build_mcq
from tasks.pages import questions
from tasks.tables import schemas, shards
from tests.conftest import ROOT, mcq_arguments, run_stage, write_rollouts

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><b id=owned>',
    "\u202eevil",
]


@pytest.fixture
def built(split_set):
    """A BuildMCQ artifact from rollouts full of markup."""
    rows = [r for r in shards.read(split_set.split, "split").to_pylist() if r["split"] == "train"]
    base = sorted({row["class_name"] for row in rows})
    answers = {
        row["image_id"]: [
            *[row["class_name"]] * (n % 3),
            *[base[(base.index(row["class_name"]) + 1 + n % 4) % len(base)]] * (1 + n % 2),
            *HOSTILE,
        ]
        for n, row in enumerate(rows)
    }
    split_set.propose = split_set.root / "hostile"
    write_rollouts(split_set.propose, answers)
    out = split_set.root / "mcq"
    out.mkdir()
    run_stage(build_mcq, out, **mcq_arguments(split_set))
    return out, json.loads((out / "stats.json").read_text())


def test_the_counts_are_those_of_the_shards(built):
    out, stats = built
    told = dict(questions.facts(stats))
    rows = shards.read(out, "mcq").to_pylist()
    assert told["questions"] == f"{len(rows)} of 60 images"
    injected = sum(row["truth_injected"] for row in rows)
    assert told["truth injected"].startswith(f"{injected} of {len(rows)} (")
    mean = sum(len(row["options"]) for row in rows) / len(rows)
    assert told["options"].startswith(f"{mean:.2f} on average")
    letters = Counter(row["answer_letter"] for row in rows)
    assert told["right letters"] == ", ".join(f"{k}: {v}" for k, v in sorted(letters.items()))
    assert "taken for" in told["most confused"]


def test_nothing_that_a_model_wrote_reaches_the_page_as_markup(built):
    out, stats = built
    page = questions.questions_page(out, stats, "Questions <of> a set", 1000)
    assert page.count("<script>") == 1
    assert "<b id=owned>" not in page
    assert "<img src=x" not in page
    assert "\u202e" not in page
    assert html.escape(HOSTILE[0], quote=True) in page
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)\w+:""", page), "no network"
    sources = set(re.findall(r'src="(.{10})', page))
    assert sources == {"data:image"}


def test_a_page_of_fewer_questions_says_so(built):
    out, stats = built
    total = shards.read(out, "mcq").num_rows
    page = questions.questions_page(out, stats, "t", 5)
    assert page.count("<article") == 5
    assert f"5 of {total} questions, drawn by a hash" in page


@pytest.mark.parametrize(
    ("margin", "level"),
    [(1, "easy"), (0.25, "easy"), (0, "close"), (-0.25, "close"), (-0.5, "hard")],
)
def test_levels(margin, level):
    assert questions.level(margin) == level


def test_inspect_prints_the_counts_and_writes_the_page(built, tmp_path, monkeypatch, capsys):
    out, stats = built
    manifest = {"stage": "BuildMCQ", "code_version": 2, "fingerprint": "0123", "dataset": "few"}
    (out / "manifest.json").write_text(json.dumps({**manifest, "rows": {"mcq": 1}, "seconds": 1}))
    (tmp_path / "luigi.cfg").write_text((ROOT / "luigi.cfg").read_text())
    monkeypatch.chdir(tmp_path)
    line = ["pipeline", "inspect", str(out), "--questions", "7"]
    monkeypatch.setattr(sys, "argv", line)
    command()
    told = capsys.readouterr().out
    for name, value in questions.facts(stats):
        assert f"{name}: {value}" in told
    assert (tmp_path / "mcq.html").read_text().count("<article") == 7
    monkeypatch.setattr(sys, "argv", [*line, "--page", "no/such/place.html"])
    with pytest.raises(SystemExit, match="give another place: --page FILE"):
        command()


def rendered(path, fragment, folder) -> str:
    """The page as the browser sees it after its script ran."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on this machine: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    flags += ["--disable-background-networking", f"--user-data-dir={folder}", "--dump-dom"]
    ran = subprocess.run(
        [browser, *flags, path.as_uri() + fragment], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


@pytest.mark.process
def test_filters_work_in_a_real_browser_and_no_injected_script_runs(built, tmp_path):
    out, stats = built
    path = tmp_path / "page.html"
    path.write_text(questions.questions_page(out, stats, "Questions", 1000), encoding="utf-8")
    rows = shards.read(out, "mcq").to_pylist()
    schema = schemas.mcq()
    assert set(rows[0]) == set(schema.names)
    wanted = next(row for row in rows if row["truth_injected"])
    truth = questions._truth(wanted)
    fits = [r for r in rows if questions._truth(r) == truth and r["truth_injected"]]
    assert 0 < len(fits) < len(rows)
    cases = {
        "": len(rows),
        f"#class={truth.replace(' ', '%20')}&injected=yes": len(fits),
        "#level=hard": sum(questions.level(row["margin"]) == "hard" for row in rows),
    }
    for fragment, count in cases.items():
        seen = rendered(path, fragment, tmp_path / "profile")
        articles = re.findall(r"<article[^>]*>", seen)
        assert len(articles) == len(rows)
        assert sum("hidden" not in article.replace("data-", "") for article in articles) == count
        assert f"<output>{count}</output>" in seen
        assert "<title>Questions</title>" in seen, "a script from a model's answer ran"
        assert 'id="owned"' not in seen
