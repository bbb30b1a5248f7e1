"""What a manifest says of the machine."""

from pipeline.artifacts import store


def test_gpus_are_named_as_their_driver_names_them(tmp_path):
    for number, text in (
        ("0000:01:00.0", "Model: \t\t NVIDIA H100\nIRQ: 1\n"),
        ("0000:02:00.0", ""),
    ):
        (tmp_path / number).mkdir()
        (tmp_path / number / "information").write_text(text)
    assert store._gpus(tmp_path) == ["NVIDIA H100"]
    assert store._gpus(tmp_path / "none") == []


def test_the_host_is_told_with_its_memory():
    told = store.host()
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0
    assert isinstance(told["gpus"], list)
