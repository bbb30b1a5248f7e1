"""Importing the trainer says nothing: a user reads every line of a run."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.process
def test_libraries_keep_quiet_while_the_trainer_is_imported():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import training.grpo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
