"""The command predict: folders and unreadable files, a table, JSON, exit codes."""

import json
from pathlib import Path

import pytest

from pipeline.cli.predict import Table, files, printable
from tasks.evaluation.prediction import Prediction
from tests.pipeline.cli.test_commands import run
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture
from tests.test_predict import NAMES, OPENED, picture, policy  # noqa: F401 - policy is a fixture


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.PNG").write_bytes(picture(1))
    (folder / "a.jpg").write_bytes(picture(2))
    (folder / "notes.txt").write_text("no image")
    return folder


def command(monkeypatch, tmp_path, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    return run(monkeypatch, "predict", *arguments)


def test_folders_give_their_images_and_an_empty_one_is_named(photos, tmp_path):
    assert [path.name for path in files(photos)] == ["a.jpg", "b.PNG"]
    assert list(files(photos / "notes.txt")) == [photos / "notes.txt"], "a file is always tried"
    (tmp_path / "empty").mkdir()
    assert list(files(tmp_path / "empty")) == [tmp_path / "empty"]


def asking(policy: Path, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "names.txt").write_text("\n".join([*NAMES, ""]))
    backend = ["--backend", "tests.test_predict:oracle", "--num-rollouts", "8"]
    return ["--policy", str(policy), "--classes", "names.txt", *backend, *more]


def test_the_command_prints_a_table_and_its_exit_code_tells(
    policy, photos, tmp_path, monkeypatch, capsys
):
    one = photos / "deep" / "b.PNG"
    assert command(monkeypatch, tmp_path, *asking(policy, tmp_path, str(one))) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "image  sure  answer",
        "b.PNG   75%  teal beetle",
        "             votes  teal beetle 6, amber beetle 2",
        "             saw    Look.",
    ]
    assert "1 image: 1 named" in err
    bad = photos / "notes.txt"
    assert command(monkeypatch, tmp_path, *asking(policy, tmp_path, str(photos), str(bad))) == 1
    out, err = capsys.readouterr()
    assert "notes.txt        not answered: not an image in a known format" in out
    assert "3 images: 2 named, 1 not answered" in err


def test_the_command_prints_json_for_scripts(policy, photos, tmp_path, monkeypatch, capsys):
    given = asking(policy, tmp_path, "--json", str(photos), "gone.jpg")
    assert command(monkeypatch, tmp_path, *given) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] == str(policy)
    assert [Path(each["image"]).name for each in told["predictions"]] == ["a.jpg", "b.PNG", "gone.jpg"]  # fmt: skip
    assert told["predictions"][1]["candidates"][0] == {"name": "teal beetle", "votes": 6}
    assert told["predictions"][2]["error"] == "No such file or directory"


def test_the_newest_policy_of_the_configuration_is_the_default(
    policy,
    photos,
    tmp_path,
    monkeypatch,
    capsys,
    config,
):
    config.set("run", "artifacts", str(tmp_path / "artifacts"))
    for number in (2, 10):
        place = tmp_path / f"artifacts/beetles/dive_k/round{number}/train/current"
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}")
        (place / "recipe.json").write_text('{"card": "beetles", "prompt_style": "stepwise"}')
    (tmp_path / "luigi.cfg").write_text("")
    given = ["--backend", "tests.test_predict:oracle", str(photos / "deep"), "--json"]
    assert command(monkeypatch, tmp_path, *given) == 0
    told = json.loads(capsys.readouterr().out)
    assert "round10" in told["policy"]
    assert told["card"] == "beetles"
    assert "step by step" in OPENED[-1].asked[0][1], "asked in the words it was trained with"
    assert told["predictions"][0]["num_rollouts"] == 20


def test_a_mistake_is_one_sentence(policy, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "x.jpg") == 1
    assert "no luigi.cfg here" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path, "--policy", "/nowhere", "--card", "beetles", "x.jpg") == 1
    assert "error: policy /nowhere: no such folder" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path, "--policy", str(policy), "--classes", "lost", "x") == 1
    assert "error: --classes lost cannot be read" in capsys.readouterr().err


def test_what_a_model_writes_cannot_steer_the_terminal():
    found = Prediction("a\x1b[2J.png", text="\x1b]0;x\x07", reasoning="line\n\x1b[31mred " * 90)
    lines = Table([Path("a.png")], width=80).lines(found)
    assert all(line.isprintable() and len(line) <= 100 for line in lines)
    assert len(lines) <= 1 + 3
    assert printable("a\u202eb\nc") == "a b c"


def test_names_are_short_where_that_tells_them_apart():
    same, apart = [Path("x/a.png"), Path("y/a.png")], [Path("x/a.png"), Path("y/b.png")]
    assert Table(same).lines(Prediction("y/a.png", answer="z"))[0].startswith("y/a.png")
    assert Table(apart).lines(Prediction("y/b.png", answer="z"))[0].startswith("b.png")
