"""luigi.cfg and its overlays in another encoding or with a fault: one sentence with file, section and key."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config_files import SettingsError, read_into, read_overlay, require_readable
from pipeline.settings import check_configuration, read_overlays
from tests.conftest import ROOT
from tests.pipeline.test_stage import config  # noqa: F401

TEXT = "# a recipe\n[Train]\nsteps = 7\n[run]\nartifacts = Käfer\n"


def write(folder: Path, data: bytes, monkeypatch) -> Path:
    """A recipe of these bytes, named in RECIPE."""
    path = folder / "mine.cfg"
    path.write_bytes(data)
    monkeypatch.setenv("RECIPE", str(path))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_recipe_is_read_however_an_editor_saves_it(config, tmp_path, monkeypatch, encoding, end):
    write(tmp_path, TEXT.replace("\n", end).encode(encoding), monkeypatch)
    read_overlays()
    assert config.get("Train", "steps") == "7"
    assert config.get("run", "artifacts") == "Käfer"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            TEXT.encode("latin-1"),
            r"section \[run\] artifacts \(line 5\) is not UTF-8; save the file",
        ),
        ("# Käfer\n[run]\n".encode("latin-1"), r"line 1 is not UTF-8; save the file as UTF-8"),
        ("[run]\n# Käfer\n".encode("latin-1"), r"line 2 is not UTF-8"),
        ("[run]\nKäfer = 3\n".encode("latin-1"), r"section \[run\] \(line 2\) is not UTF-8"),
        (TEXT.encode("utf-16"), r"line 1 is not UTF-8"),
        (b"steps = 7\n", r"File contains no section headers"),
        (b"[Train]\nsteps = 7\nsteps = 8\n", r"option 'steps' in section 'Train' already exists"),
        (b"[Train]\nsteps\n", r"contains parsing errors"),
        (b"[Train]\nsteps = five\n", r"section \[Train\] steps must be a whole number; got 'five'"),
        (b"[Train]\nstep = 5\n", r"section \[Train\] has no key 'step'; did you mean steps"),
        (b"[Trian]\nsteps = 5\n", r"unknown section \[Trian\]; did you mean Train"),
        (b"[run]\nartifacts = 5%\n", r"section \[run\] artifacts: '%' must be followed by"),
        (b"[run]\nartifacts = ${NOWHERE}\n", r"section \[run\] artifacts: .*environment variable"),
    ],
)
def test_a_fault_of_a_recipe_names_its_file_section_and_key(
    config, tmp_path, monkeypatch, data, sentence
):
    path = write(tmp_path, data, monkeypatch)
    with pytest.raises(SettingsError, match=f"^error: {path}: .*{sentence}"):
        check_configuration()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("BasePolicy", "max_pixels", "401408 # 512 merged"),  # a whole number
        ("Train", "learning_rate", "1e-5 ; small"),  # a number
        ("Train", "carry_over", "true # one run"),  # true or false
        ("Train", "order", "shuffled # or curriculum"),  # a choice
        ("Train", "freeze", "vision # not the rest"),  # some of several words
        ("BasePolicy", "model", "Qwen/Qwen2.5-VL-3B-Instruct # a hub id"),  # texts
        ("run", "artifacts", "artifacts\t# a folder"),
        ("Split", "split_file", "# none"),
        ("Evaluate", "datasets", "cub pets # two"),
        ("Train", "trl", '{"beta": 0.1} # the paper'),  # JSON
        ("Compare", "seeds", "[0, 1, 2] ; three"),
        ("run", "dataset", "cub # birds"),  # of the graph
        ("Train:cub", "steps", "5 # fewer"),  # of one dataset
        ("core", "log_level", "INFO # or DEBUG"),  # Luigi's own
        ("resources", "gpu", "2 # of them"),
    ],
)
def test_a_comment_behind_a_value_is_refused_by_file_section_and_key(
    config, tmp_path, monkeypatch, section, key, value
):
    path = write(tmp_path, f"[{section}]\n{key} = {value}\n".encode(), monkeypatch)
    shown = re.escape(repr(value))
    says = rf"^error: {path}: section \[{section}\] {key}: {shown} holds a comment, which would be"
    with pytest.raises(SettingsError, match=says):
        check_configuration()


def test_signs_of_comments_inside_a_value_are_a_part_of_it(config, tmp_path, monkeypatch):
    text = '[run]\nartifacts = birds#2;new\n[Train]\ntrl = {"run_name": "a # b", "use_cpu": true}\n'
    write(tmp_path, text.encode(), monkeypatch)
    check_configuration()
    assert config.get("run", "artifacts") == "birds#2;new"


def test_a_fault_of_luigi_cfg_beside_a_sound_recipe_names_luigi_cfg(config, tmp_path, monkeypatch):
    write(tmp_path, TEXT.encode(), monkeypatch)
    config.set("Train", "num_generations", "many")
    with pytest.raises(
        SettingsError, match=r"luigi.cfg: section \[Train\] num_generations must be"
    ):
        check_configuration()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            TEXT.encode("latin-1"),
            r"luigi.cfg: section \[run\] artifacts \(line 5\) is not UTF-8; save",
        ),
        (TEXT.encode("utf-8-sig"), r"luigi.cfg begins with a byte order mark, which Luigi cannot"),
        (b"steps = 7\n", r"luigi.cfg: File contains no section headers"),
    ],
)
def test_a_luigi_cfg_that_luigi_cannot_read_is_a_sentence(tmp_path, monkeypatch, data, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "luigi.cfg").write_bytes(data)
    with pytest.raises(SettingsError, match=sentence):
        require_readable()
    (tmp_path / "luigi.cfg").write_bytes(TEXT.replace("\n", "\r\n").encode())
    require_readable()


def test_a_recipe_gives_what_the_plain_parser_gives():
    for path in (ROOT / "training" / "recipes").glob("*.cfg"):
        plain, ours = configparser.RawConfigParser(), configparser.RawConfigParser()
        plain.read(path, encoding="utf-8")
        read_into(ours, path)
        assert plain == ours


@pytest.mark.process
def test_a_bare_luigi_ends_before_our_code_and_shows_the_mark(tmp_path):
    (tmp_path / "luigi.cfg").write_bytes(TEXT.encode("utf-8-sig"))
    command = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", "Split"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MissingSectionHeaderError" in done.stderr
    assert r"'\ufeff# a recipe\n'" in done.stderr, "as docs/operations.md quotes it"


@pytest.mark.process
def test_the_commands_refuse_it_before_luigi_is_imported(tmp_path):
    (tmp_path / "luigi.cfg").write_bytes(TEXT.encode("latin-1"))
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    for command in (["-m", "pipeline", "status"], ["-c", "import pipeline"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(
            "error: luigi.cfg: section [run] artifacts (line 5) is not UTF"
        )


def test_a_key_with_a_dot_sets_one_entry_of_an_object(tmp_path):
    base = configparser.RawConfigParser()
    base.read_string('[Train]\nsteps = 5\ntrl = {"beta": 0.05, "use_cpu": true}\n')
    overlay = tmp_path / "loss.cfg"
    overlay.write_text(
        "[Train]\ntrl.beta = 0.0\ntrl.loss_type = gspo\n[Train:cub]\ntrl.epsilon = 3e-4\n"
    )
    keys = read_overlay(base, overlay)
    assert json.loads(base["Train"]["trl"]) == {
        "beta": 0.0, "use_cpu": True, "loss_type": "gspo"
    }  # fmt: skip
    of_cub = json.loads(base["Train:cub"]["trl"])
    assert of_cub == {"beta": 0.0, "use_cpu": True, "loss_type": "gspo", "epsilon": 3e-4}
    assert set(keys) == {("Train", "trl"), ("Train:cub", "trl")}
    assert base.options("Train") == ["steps", "trl"]
    for line in ("steps.x = 1", "rewards.overlong = 1"):
        overlay.write_text(f"[Train]\n{line}\n")
        name = line.partition(".")[0]
        with pytest.raises(
            SystemExit, match=rf"loss.cfg: section \[Train\]: {name} has no entries"
        ):
            read_overlay(base, overlay)
