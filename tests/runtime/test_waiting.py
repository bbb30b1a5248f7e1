"""A line while a model loads: heard, not repeated in a log, and not said of what is quick."""

import os
import time

import pytest

from tasks.engines.base import quiet_start
from tasks.runtime import waiting


def told(monkeypatch, terminal: bool, seconds: float, columns: str = "40") -> list[str]:
    """All that is written while something takes so long, by a clock that is turned by hand."""
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", columns)
    written: list[str] = []

    def wait(most: float) -> bool:
        over = now[0] + most >= seconds
        now[0] = min(now[0] + most, seconds)
        return over

    waiting._announce("train: loading 7.5 GB", terminal, wait, written.append)
    return written


def test_what_is_quick_needs_no_word(monkeypatch):
    assert told(monkeypatch, False, 4.0) == []
    assert told(monkeypatch, True, 4.0) == []


def test_a_log_gets_a_line_a_minute(monkeypatch):
    assert told(monkeypatch, False, 200.0) == [
        "\rtrain: loading 7.5 GB\n",
        "\rstill at it, 65 s\n",
        "\rstill at it, 2.1 min\n",
        "\rstill at it, 3.1 min\n",
        "\rthat took 3.3 min\n",
    ]


def test_a_terminal_gets_one_line_that_counts(monkeypatch):
    lines = "".join(told(monkeypatch, True, 8.0)).split("\n")
    assert [line.rpartition("\r")[2].strip() for line in lines] == [
        "train: loading 7.5 GB", "that took 8 s", "",
    ]  # fmt: skip
    assert lines[1].split("\r")[1].strip() == "still at it, 6 s"
    assert {len(part) for line in lines for part in line.split("\r") if part} == {39}


def heard(capfd, ready=lambda: None) -> str:
    """What reaches standard error, after waiting for the first of it."""
    said = ""
    while "\n" not in said:
        time.sleep(0.01)
        said += capfd.readouterr().err
    ready()
    return said + capfd.readouterr().err


def test_it_is_heard_while_a_librarys_chatter_is_not(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "SOON", 0.0)
    with waiting.loading("loading it") as ready, quiet_start():
        os.write(2, b"chatter")
        said = heard(capfd, ready)
        ready()
    assert said.startswith("\rloading it")
    assert "that took 0 s" in said
    assert "chatter" not in said


def test_a_server_and_the_other_processes_of_a_launcher_say_nothing(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "SOON", 0.0)
    with waiting.opening("propose", "policy", "server") as ready:
        ready()
    monkeypatch.setenv("RANK", "1")
    with waiting.loading("loading it"):
        pass
    assert capfd.readouterr().err == ""


def test_a_failure_ends_it(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "SOON", 0.0)

    def fail() -> None:
        heard(capfd)
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"), waiting.loading("loading it"):
        fail()
    open_files = len(os.listdir("/proc/self/fd"))
    with waiting.loading("loading it"):
        heard(capfd)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_model_is_named_by_the_size_of_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model-1.safetensors").open("wb") as file:
        file.truncate(7_500_000_000)
    assert waiting.weights(tmp_path) == f"7.5 GB from {tmp_path}"
    assert waiting.weights("owner/model").startswith("owner/model from the Hugging Face hub")


def test_propose_says_it_until_the_engine_is_ready(monkeypatch, capfd, split_set):
    from tasks.propose import propose
    from tests.conftest import propose_arguments, run_stage

    monkeypatch.setattr(waiting, "SOON", 0.0)
    output = split_set.root / "propose"
    output.mkdir()
    run_stage(propose, output, **propose_arguments(split_set))
    assert "propose: the engine loads" in capfd.readouterr().err
