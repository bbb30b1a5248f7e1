"""python -m pipeline inspect: filters, JSON, pages with thumbnails; commands that are light."""

import json
import os
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from pipeline.cli import inspect
from pipeline.cli.where import ConditionError
from tasks.pages import style
from tasks.runtime.errors import ShardError
from tasks.tables import shards
from tests.conftest import ROOT
from tests.pipeline.cli.test_commands import root, run, writable  # noqa: F401 - a fixture


def test_inspect_shows_the_rows_that_fit(root, monkeypatch, capsys):
    line = ["inspect", "propose", "--where", "finish_reason == 'length'", "--rows", "4", "--json"]
    assert run(monkeypatch, *line) == 0
    (told,) = json.loads(capsys.readouterr().out)
    (table,) = told["tables"]
    rows = shards.read(root / "few/round0/propose/p1", "rollouts").to_pylist()
    cut = [row for row in rows if row["finish_reason"] == "length"]
    assert (table["rows"], table["fit"]) == (len(rows), len(cut))
    assert table["first"] == cut[:4]
    assert table["columns"]["num_tokens"] == "int32"


def test_a_filter_tells_only_of_tables_that_have_its_columns(root, monkeypatch, capsys):
    assert run(monkeypatch, "inspect", "build_mcq", "--where", "truth_injected") == 0
    told = capsys.readouterr().out
    assert "mcq: " in told
    assert "candidates: " not in told


def test_a_filter_on_no_column_ends_in_one_sentence(root, monkeypatch, capsys):
    assert run(monkeypatch, "inspect", "propose", "--where", "finish_reson == 'length'") == 1
    error = capsys.readouterr().err
    assert "error: --where: there is no column 'finish_reson'; did you mean finish_reason?" in error
    assert "Traceback" not in error


def test_a_page_shows_images_as_thumbnails_and_escapes_the_rest(root, monkeypatch):
    line = ["inspect", "download", "--page", "page.html", "--rows", "7"]
    assert run(monkeypatch, *line) == 0
    text = (root.parent / "page.html").read_text()
    assert text.count('<img src="data:image/') == 7
    assert style.POLICY in text
    assert "<script" not in text


def test_two_artifacts_of_a_stage_get_a_page_each(root, monkeypatch):
    from tests.pipeline.cli.test_commands import commit

    commit(root, "few/dive_k/round1/propose", "p9", "Propose", root / "few/round0/propose/p1")
    assert run(monkeypatch, "inspect", "propose", "--page", "page.html") == 0
    assert {path.name for path in root.parent.glob("page*")} == {"page-p1.html", "page-p9.html"}


def test_rows_without_images_show_those_of_their_ids(root):
    text = inspect.page(root / "few/round0/propose/p1", 5, "finish_reason == 'stop'")
    assert text.count('<img src="data:image/') == 5
    assert "&lt;think&gt;" in text
    assert "<think>" not in text


def test_a_damaged_row_is_named_wherever_the_damage_lies(root):
    path = root / "few/round0/propose/p1/rollouts-00000.parquet"
    group = pq.read_metadata(path).row_group(0)
    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
    column = group.column(names.index("completion"))
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + column.total_compressed_size - 1] ^= 1
    writable(path).write_bytes(data)
    for where in ("", "finish_reason = 'stop'"):
        with pytest.raises(ShardError, match=r"rollouts-00000\.parquet is damaged"):
            inspect.tables(path.parent, 3, where)


def test_a_filter_that_no_single_table_fits_is_named(root):
    with pytest.raises(ConditionError, match="no table has all of"):
        inspect.tables(root / "few/dive_k/round0/build_mcq/m1", 3, "truth_injected and votes == 1")


@pytest.mark.parametrize(
    "line", [["status"], ["gc"], ["results"], ["diff", "a", "b"], ["invalidate", "x"]], ids=" ".join
)
def test_what_only_reads_manifests_imports_nothing_heavy(tmp_path, line):
    code = (
        "import sys\nfrom pipeline.__main__ import main\n"
        f"sys.argv = ['pipeline', *{line!r}]\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'vllm', 'trl', 'jinja2', 'duckdb'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "HEAVY []" in ran.stdout, ran.stdout + ran.stderr


# As with an engine whose process is gone: telling it something is an exception, and not the end.
TOLD = """
import os, sys
from pipeline import __main__ as workbench

def run(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        os.write(write, b"x")
    except BrokenPipeError:
        print("told")
    return 0

workbench._run = run
sys.argv = ["pipeline", "status"]
workbench.main()
"""


def test_a_command_survives_a_process_that_is_gone():
    ran = subprocess.run([sys.executable, "-c", TOLD], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "told\n"), ran.stderr


@pytest.mark.parametrize("line", [["status"], ["plan"]], ids=" ".join)
def test_a_command_whose_reader_has_gone_ends_without_a_word(line):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as nobody:
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline", *line],
            cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (["staus"], 2, "no command 'staus'; did you mean status?"),
        (["status", "TranDiVE"], 1, "no task 'TranDiVE'; did you mean TrainDiVE?"),
        (["status", "tasks"], 1, "no task 'tasks'"),
        (["inspect", "propse"], 1, "no artifact 'propse'"),
        (
            ["where", "--dataset", "none"],
            1,
            "no report under artifacts/none yet",
        ),  # as it was called
    ],
)
def test_a_wrong_name_is_met_with_the_right_one(line, code, told):
    ran = subprocess.run(
        [sys.executable, "-m", "pipeline", *line], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == code
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr


def test_every_command_has_an_example_and_prints_json():
    for command in ("results", "status", "inspect", "verify", "invalidate", "gc", "diff"):
        ran = subprocess.run(
            [sys.executable, "-m", "pipeline", command, "--help"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"python -m pipeline {command}" in ran.stdout
        assert "--json" in ran.stdout


def test_a_damaged_manifest_ends_in_one_sentence(root, monkeypatch, capsys):
    path = root / "few/round0/propose/p1/manifest.json"
    path.parent.chmod(0o755)
    path.chmod(0o644)
    path.write_text(path.read_text()[:-9])
    for line in (["gc"], ["inspect", "propose"]):
        assert run(monkeypatch, *line) == 1
        error = capsys.readouterr().err
        assert "manifest.json cannot be read" in error
        assert "Traceback" not in error
    assert run(monkeypatch, "verify", "propose") == 1
    assert "manifest.json" in capsys.readouterr().out
