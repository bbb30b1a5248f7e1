"""Datasets in hub layout: read by class name, gone on with after a cut, refused in a sentence."""

import io
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

import data_cards
import tasks.ingest.hub
from tasks.download import download
from tasks.runtime.errors import StageError
from tasks.tables import shards
from tests.conftest import run_stage


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 90, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local folder in hub layout, a card over it, and what was put in."""
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)

    def make(label: datasets.Value | datasets.ClassLabel, values: list, extra: str = "") -> None:
        features = datasets.Features({"picture": datasets.Image(), "sort": label})
        for split in ("train", "test"):
            rows = {
                "picture": [{"bytes": picture(i), "path": None} for i in range(len(values))],
                "sort": values,
            }
            table = datasets.Dataset.from_dict(rows, features=features)
            folder = tmp_path / "repo" / "data"
            folder.mkdir(parents=True, exist_ok=True)
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        (tmp_path / "mine.md").write_text(
            f"---\nversion: 1\nnoun: thing\nkind: sort\nsource:\n  kind: hub\n"
            f"  repo: {tmp_path / 'repo'}\n  revision: null\n  image: picture\n  label: sort\n{extra}"
            f'classes: [Red Kite, Buzzard]\naliases: {{Buzzard: ["common buzzard"]}}\n---\n'
        )
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "out").mkdir()

    return make


@pytest.mark.parametrize("kind", ["ClassLabel", "string"])
def test_a_hub_dataset_is_read_by_class_name_and_keeps_its_bytes(hub, tmp_path, kind):
    names = ["common_buzzard", "red kite"]  # another order and spelling than the card's
    if kind == "ClassLabel":
        hub(datasets.ClassLabel(names=names), [0, 1, 1])
    else:
        hub(datasets.Value("string"), [names[i] for i in (0, 1, 1)])
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)
    rows = shards.read(tmp_path / "out", "images").to_pylist()
    assert [(r["official_split"], r["label"]) for r in rows] == [
        ("train", 1), ("train", 0), ("train", 0), ("test", 1), ("test", 0), ("test", 0),
    ]  # fmt: skip
    assert [r["image"]["bytes"] for r in rows] == [picture(i) for i in (0, 1, 2)] * 2
    assert len({r["image_id"] for r in rows}) == 6


def test_a_hub_class_that_the_card_lacks_is_an_error_that_names_it(hub, tmp_path):
    hub(datasets.Value("string"), ["red kite", "osprey"])
    with pytest.raises(StageError, match="has the class 'osprey', which is neither"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


def test_a_hub_split_without_labels_is_not_given_the_last_class(hub, tmp_path):
    hub(datasets.ClassLabel(names=["red kite", "buzzard"]), [0, 1, -1])
    with pytest.raises(StageError, match=r"image without a label .-1.; leave its split out"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


def test_a_hub_column_that_is_not_there_is_named_with_those_that_are(hub, tmp_path):
    hub(datasets.Value("string"), ["red kite", "buzzard"])
    path = tmp_path / "mine.md"
    path.write_text(path.read_text().replace("label: sort", "label: class"))
    with pytest.raises(StageError, match="no column 'class'; it has picture, sort"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


def test_a_hub_split_that_is_not_there_is_named(hub, tmp_path):
    hub(datasets.Value("string"), ["red kite", "buzzard"], "  splits: {validation: val}\n")
    with pytest.raises(StageError, match=r"split 'validation' of .* cannot be loaded"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


def test_a_hub_download_that_was_cut_off_goes_on_behind_its_last_shard(hub, tmp_path, monkeypatch):
    hub(datasets.Value("string"), ["red kite", "buzzard", "red kite"])
    monkeypatch.setattr("tasks.download.IMAGES_PER_SHARD", 2)
    original, read = tasks.ingest.hub._bytes, []

    def cut(given):
        read.append(given["bytes"])
        if len(read) == 4:
            raise OSError("the line is dead")
        return original(given)

    monkeypatch.setattr("tasks.ingest.hub._bytes", cut)
    with pytest.raises(OSError, match="the line is dead"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0, decode_threads=1)
    first = tmp_path / "out" / "images-00000.parquet"
    before = first.stat().st_mtime_ns
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0, decode_threads=1)
    assert first.stat().st_mtime_ns == before
    ids = shards.read(tmp_path / "out", "images")["image_id"].to_pylist()
    assert ids == [f"mine/{split}/{i:07d}" for split in ("train", "test") for i in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images-00000.parquet", "images-00001.parquet", "images-00002.parquet", "stats.json",
    ]  # fmt: skip


def test_a_hub_line_that_breaks_in_the_middle_says_how_far_it_came(hub, tmp_path, monkeypatch):
    hub(datasets.Value("string"), ["red kite", "buzzard", "red kite"])

    class Dying:
        info, features = datasets.DatasetInfo(), {"picture": None, "sort": None}

        def cast_column(self, *_):
            return self

        def __iter__(self):
            yield {"picture": {"bytes": picture(1)}, "sort": "buzzard"}
            raise ConnectionError("reset by peer")

    monkeypatch.setattr("tasks.ingest.hub._stream", lambda *_: Dying())
    with pytest.raises(
        StageError, match=r"stopped after 1 images of split 'train': reset.*run again"
    ):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)


def test_a_hub_folder_of_image_files_is_read_like_one_of_tables(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for number, name in enumerate(("red_kite", "buzzard")):
            (tmp_path / "repo" / split / name).mkdir(parents=True)
            (tmp_path / "repo" / split / name / "a.jpg").write_bytes(picture(number))
    (tmp_path / "mine.md").write_text(
        f"---\nversion: 1\nnoun: thing\nkind: sort\nsource: {{kind: hub, repo: {tmp_path / 'repo'}, "
        "revision: null}\nclasses: [Red Kite, Buzzard]\n---\n"
    )
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "out").mkdir()
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)
    rows = shards.read(tmp_path / "out", "images").to_pylist()
    assert sorted((r["official_split"], r["label"]) for r in rows) == [
        ("test", 0), ("test", 1), ("train", 0), ("train", 1),
    ]  # fmt: skip
    assert {r["image"]["bytes"] for r in rows} == {picture(0), picture(1)}


def test_a_card_of_archives_can_be_read_from_its_mirror_instead(hub, tmp_path):
    hub(datasets.ClassLabel(names=["1.common_buzzard", "002.Red_kite"]), [0, 1])
    card = tmp_path / "mine.md"
    text = card.read_text()
    source = text[text.index("source:") : text.index("classes:")]
    card.write_text(
        text.replace(
            source,
            "source:\n  kind: archive\n  layout: cub\n  files: [{name: x.tgz, md5: '0'}]\n"
            f"  mirror: {{repo: {tmp_path / 'repo'}, image: picture, label: sort}}\n",
        )
    )
    with pytest.raises(StageError, match=r"x\.tgz can no longer be downloaded"):
        run_stage(
            download,
            tmp_path / "out",
            card="mine",
            max_reject_share=0.0,
            archives=tmp_path / "none",
        )
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0, mirror=True)
    assert shards.read(tmp_path / "out", "images")["label"].to_pylist() == [1, 0, 1, 0]
    card.write_text(card.read_text().replace("  mirror:", "  crop_bottom: 0 #"))
    with pytest.raises(StageError, match="names no mirror"):
        run_stage(download, tmp_path / "out2", card="mine", max_reject_share=0.0, mirror=True)


def test_a_repo_without_a_revision_is_read_at_its_newest_commit_which_is_recorded(
    hub, tmp_path, monkeypatch
):
    hub(datasets.Value("string"), ["red kite", "buzzard"])
    asked = []

    class Hub:
        def dataset_info(self, repo):
            return SimpleNamespace(sha="c0ffee")

    original = tasks.ingest.hub._stream

    def stream(repo, config, revision, split):
        asked.append((repo, revision))
        return original(str(tmp_path / "repo"), config, None, split)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("tasks.ingest.hub._stream", stream)
    card = tmp_path / "mine.md"
    card.write_text(card.read_text().replace(str(tmp_path / "repo"), "owner/name"))
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0)
    assert set(asked) == {("owner/name", "c0ffee")}
    assert '"revision": "c0ffee"' in (tmp_path / "out" / "stats.json").read_text()
