"""What a failed stage is told by: its sentence, or its exception, and never its progress bar."""

import pytest

from pipeline.artifacts import child, store
from tests.pipeline.artifacts.test_child import stage  # noqa: F401 - a fixture

# A stage with a bar on a terminal, in the middle of which `{}` happens.
BAR = """
import os
os.environ["DIVE_TERMINAL"] = "1"
from pathlib import Path
from tasks.runtime.command import main
from tasks.runtime.errors import StageError
from tasks.runtime.progress import progress

def train(output: Path):
    "Train."
    bar = progress(None, desc="train", total=4, unit="steps")
    bar.update(2)
    {}

main(train)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("happens", "says"),
    [
        ("raise KeyError('colour')", "KeyError: 'colour' (exit code 1; the log is "),
        ("raise RuntimeError('50% of\\n  it')", "RuntimeError: 50% of (exit code 1"),
        ("raise AssertionError", "AssertionError (exit code 1"),
        ("import json; json.loads('{')", "json.decoder.JSONDecodeError: Expecting property"),
        ("raise StageError('lower it')", "lower it"),
        ("raise SystemExit(3)", "(exit code 3"),
        # The folder is no place for error.txt, as on a full disk.
        ("output.rename('gone'); raise StageError('make room')", "make room"),
    ],
)
def test_an_error_in_the_middle_of_a_bar_is_told_by_its_own_words(
    stage, tmp_path, monkeypatch, happens, says
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(store.StageFailed) as caught:
        stage(BAR.replace("{}", happens))
    assert str(caught.value).startswith(f"Some failed: {says}")


@pytest.mark.process
@pytest.mark.parametrize("bar", ["train:  50%|#####     | 2/4 [00:01<00:01,  2.0steps/s]",
                                 "train: 2 images [00:01,  2.0images/s]"])  # fmt: skip
def test_a_bar_that_is_drawn_after_the_error_is_not_the_error(stage, bar):
    with pytest.raises(store.StageFailed) as caught:
        stage(
            "import atexit, sys\n"
            f"atexit.register(lambda: sys.stderr.write('\\r{bar}\\n'))\n"
            f"sys.stderr.write('\\r{bar}')\nraise ValueError('oops')"
        )
    assert str(caught.value).startswith("Some failed: ValueError: oops (exit code 1")


def test_a_line_of_stdout_between_those_of_a_traceback_is_not_the_error(tmp_path):
    log = child._Log(tmp_path / "run.log", [])
    log.line("Traceback (most recent call last):", 2)
    log.line("before", 1)  # its stream is read by a thread of its own, which may come late
    log.line("ValueError: oops", 2)
    log.close()
    assert log.exception == "ValueError: oops"
    assert list(log.last)[1] == "before"


def test_the_exception_is_found_among_the_lines_of_several_processes():
    lines = [
        "loading",
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "x.py", line 1, in f',
        "[rank1]:     f()",
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.",
        "Traceback (most recent call last):",
        '  File "run.py", line 1, in main',
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "====",
        "train:  50%|#####     | 2/4 [00:01<00:01,  2.0steps/s]",
    ]
    assert child.last_words(lines) == "torch.OutOfMemoryError: CUDA out of memory."
    assert child.last_words(["step: refused", lines[-1], ""]) == "step: refused"
    assert child.last_words([]) == ""
