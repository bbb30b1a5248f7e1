"""The file of class names for `predict --classes`, as editors save it."""

import pytest

from pipeline.cli.predict import classes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_file_of_class_names_is_read_however_an_editor_saves_it(tmp_path, encoding, end):
    path = tmp_path / "names.txt"
    path.write_bytes(f"Käfer{end}007{end}".encode(encoding))
    assert classes(path) == ["Käfer", "007"]


def test_a_file_of_class_names_in_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("Käfer\n".encode("latin-1"))
    with pytest.raises(SystemExit, match=r"--classes .*names.txt cannot be read"):
        classes(path)
