"""The one reader of manifests: typed values, and one sentence where there are none."""

import json

import pytest

from tasks.runtime.errors import StageError
from tasks.tables import manifest


def write(folder, values) -> None:
    (folder / manifest.FILE).write_text(values if isinstance(values, str) else json.dumps(values))


def test_a_manifest_is_read_with_its_files_and_unknown_keys_are_left_out(tmp_path):
    files = {
        "mcq-00000.parquet": {"sha256": "ab", "bytes": 7, "rows": 3},
        "run.log": {"sha256": "cd", "bytes": 5},
    }
    values = {"manifest_version": 2, "stage": "BuildMCQ", "fingerprint": "f", "files": files}
    write(tmp_path, {**values, "inputs": {"split": "s"}, "key_of_tomorrow": 1})
    read = manifest.read(tmp_path)
    assert (read.stage, read.fingerprint, read.bytes) == ("BuildMCQ", "f", 12)
    assert read.files["mcq-00000.parquet"].rows == 3
    assert read.files["run.log"].rows is None
    assert read.identity == {
        "settings": {}, "inputs": {"split": "s"}, "code_version": None, "card_sha256": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ("[]", "of a newer version"),
        ('{"manifest_version": 99}', "of a newer version"),
        (None, "cannot be read .No such file"),
    ],
)
def test_what_cannot_be_read_ends_in_one_sentence(tmp_path, text, sentence):
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(StageError, match=sentence):
        manifest.read(tmp_path)


def test_a_manifest_whose_list_of_files_was_damaged_is_a_sentence():
    with pytest.raises(
        StageError, match=r"the manifest of Split is damaged: .*byter.*; delete the"
    ):
        manifest.Manifest.of(
            {"stage": "Split", "files": {"split.parquet": {"byter": 3, "sha256": ""}}}
        )
    with pytest.raises(StageError, match="is damaged"):
        manifest.Manifest.of({"files": [1]})
