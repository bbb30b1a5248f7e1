"""The machine that a manifest records."""

from pipeline.artifacts import host


def test_gpus_are_named_as_their_driver_names_them(tmp_path):
    for number, text in (
        ("0000:01:00.0", "Model: \t\t NVIDIA H100\nIRQ: 1\n"),
        ("0000:02:00.0", ""),
    ):
        (tmp_path / number).mkdir()
        (tmp_path / number / "information").write_text(text)
    assert host._gpu_names(tmp_path) == ["NVIDIA H100"]
    assert host._gpu_names(tmp_path / "none") == []


def test_the_host_is_recorded_with_its_memory():
    machine = host.host()
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert isinstance(machine["gpus"], list)
