"""Without a clone: the wheel holds cards, templates and recipes, and runs from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds, as pip would unpack it."""
    root = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / "source" / name)
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, str(root)],
        cwd=root / "source", check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(root / "site")
    return root / "site"


@pytest.mark.process
def test_the_wheel_holds_every_module_card_template_and_recipe(installed):
    tops = ("pipeline", "tasks", "training", "data_cards")
    kinds = {
        ".py", ".md", ".jinja", ".css", ".js", ".cfg", ".yaml", ".json", ".safetensors",
    }  # fmt: skip
    expected = {
        path.relative_to(ROOT).as_posix()
        for top in tops
        for path in (ROOT / top).rglob("*")
        if path.suffix in kinds
    }
    held = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    assert expected <= held
    assert not any(name.startswith("tests/") for name in held)


@pytest.mark.process
def test_the_wheel_runs_from_a_folder_with_a_configuration_and_nothing_else(installed, tmp_path):
    shutil.copy(ROOT / "luigi.cfg", tmp_path)
    run = {
        "cwd": tmp_path, "capture_output": True, "text": True,
        "env": {**os.environ, "PYTHONPATH": str(installed)},
    }  # fmt: skip
    line = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", "Download"]
    done = subprocess.run(line, **run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("artifacts/beetles/download/current/images-*.parquet"))
    done = subprocess.run([sys.executable, "-m", "pipeline", "status"], **run)
    assert "Download" in done.stdout, done.stderr
