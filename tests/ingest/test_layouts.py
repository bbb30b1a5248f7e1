"""The five benchmark archives, in small but in their real layout and with their real quirks."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import data_cards
from tasks.download import download
from tasks.ingest import layouts
from tasks.runtime.errors import StageError
from tasks.split import split
from tasks.tables import shards
from tests.conftest import run_stage


def picture(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (30, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else (90, 60, 30, 255)[: len(mode)]).save(buffer, kind)
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def mat(path: Path, **values) -> Path:
    savemat(path, values)
    return path


def text(*lines: str) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


def cub(folder: Path) -> list[Path]:
    top = "CUB_200_2011"
    names = ["001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg"]
    names += ["001.Black_footed_Albatross/b.jpg", "002.Laysan_Albatross/c.jpg"]
    names += ["002.Laysan_Albatross/d.jpg"]
    files = {
        f"{top}/images/{name}": picture(mode="L" if name.endswith("b.jpg") else "RGB")
        for name in names
    }
    files["attributes.txt"] = b"left alone"
    files[f"{top}/images.txt"] = text(*(f"{i} {name}" for i, name in enumerate(names, 1)))
    files[f"{top}/image_class_labels.txt"] = text("1 1", "2 1", "3 2", "4 2")
    files[f"{top}/train_test_split.txt"] = text("1 1", "2 0", "3 1", "4 0")
    return [pack(folder / "CUB_200_2011.tgz", files)]


def flowers(folder: Path) -> list[Path]:
    images = {f"jpg/image_{i:05d}.jpg": picture() for i in range(1, 7)}
    return [
        pack(folder / "102flowers.tgz", images),
        mat(folder / "imagelabels.mat", labels=np.array([[2, 1, 1, 2, 1, 2]], dtype=np.uint8)),
        mat(
            folder / "setid.mat",
            trnid=np.array([[1, 2]]),
            valid=np.array([[3, 4]]),
            tstid=np.array([[6, 5]]),
        ),
    ]


def pets(folder: Path) -> list[Path]:
    images = {
        "images/Abyssinian_1.jpg": picture("PNG", "RGBA"),  # a PNG by another name
        "images/Abyssinian_5.jpg": picture("GIF"),
        "images/american_bulldog_2.jpg": picture(),
        "images/american_bulldog_3.jpg": picture(),
        "images/american_bulldog_3.mat": b"a stray file",
    }
    lists = {
        "annotations/trainval.txt": text("Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1"),
        "annotations/test.txt": text("# name class species breed", "Abyssinian_5 1 1 1", "american_bulldog_3 2 2 1"),
    }  # fmt: skip
    return [pack(folder / "images.tar.gz", images), pack(folder / "annotations.tar.gz", lists)]


def cars(folder: Path) -> list[Path]:
    def annotations(rows):
        fields = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        return np.array([(1, label, name) for name, label in rows], dtype=fields).reshape(1, -1)

    names = [("00001.jpg", 2), ("00002.jpg", 1)]
    train = {f"cars_train/{name}": picture() for name, _ in names}
    test = {f"cars_test/{name}": picture() for name, _ in names}  # the same names once more
    kit = mat(folder / "kit.mat", annotations=annotations(names))
    devkit = {"devkit/cars_train_annos.mat": kit.read_bytes()}
    kit.unlink()
    return [
        pack(folder / "cars_train.tgz", train),
        pack(folder / "cars_test.tgz", test),
        pack(folder / "car_devkit.tgz", devkit),
        mat(folder / "cars_test_annos_withlabels.mat", annotations=annotations(names[::-1])),
    ]


def aircraft(folder: Path) -> list[Path]:
    top = "fgvc-aircraft-2013b/data"
    files = {f"{top}/images/{i:07d}.jpg": picture() for i in range(1, 6)}
    files[f"{top}/images_variant_train.txt"] = text("0000001 707-320", "0000002 F/A-18")
    files[f"{top}/images_variant_val.txt"] = text("0000003 F/A-18")
    files[f"{top}/images_variant_test.txt"] = text("0000004 707-320", "0000005 F/A-18")
    return [pack(folder / "fgvc-aircraft-2013b.tar.gz", files)]


# Layout: the maker, the class names, (file name, label, split) of every image in order, extra keys.
CASES = {
    "cub": (cub, ["Black-footed Albatross", "Laysan Albatross"],
            [("Black_Footed_Albatross_0001_796111.jpg", 0, "train"), ("b.jpg", 0, "test"),
             ("c.jpg", 1, "train"), ("d.jpg", 1, "test")], ""),
    "flowers": (flowers, ["pink primrose", "hard-leaved pocket orchid"],
                [("image_00001.jpg", 1, "train"), ("image_00002.jpg", 0, "train"),
                 ("image_00003.jpg", 0, "val"), ("image_00004.jpg", 1, "val"),
                 ("image_00005.jpg", 0, "test"), ("image_00006.jpg", 1, "test")], ""),
    "pets": (pets, ["Abyssinian", "American Bulldog"],
             [("Abyssinian_1.jpg", 0, "train"), ("american_bulldog_2.jpg", 1, "train"),
              ("Abyssinian_5.jpg", 0, "test"), ("american_bulldog_3.jpg", 1, "test")], ""),
    "cars": (cars, ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"],
             [("00001.jpg", 1, "train"), ("00002.jpg", 0, "train"),
              ("00002.jpg", 0, "test"), ("00001.jpg", 1, "test")], ""),
    "aircraft": (aircraft, ["707-320", "F/A-18"],
                 [("0000001.jpg", 0, "train"), ("0000002.jpg", 1, "train"),
                  ("0000003.jpg", 1, "val"), ("0000004.jpg", 0, "test"), ("0000005.jpg", 1, "test")], "  crop_bottom: 20\n"),
}  # fmt: skip


@pytest.fixture
def card(tmp_path, monkeypatch):
    """Write a card over archives that lie in `tmp_path / archives`."""
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    folder = tmp_path / "archives"
    folder.mkdir()

    def write(layout: str, classes: list[str] | None = None) -> Path:
        make, names, _, extra = CASES[layout]
        files = "".join(
            f"    - {{name: {p.name}, md5: {hashlib.md5(p.read_bytes()).hexdigest()}}}\n"
            for p in make(folder)
        )
        listed = "".join(f"  - {json.dumps(name)}\n" for name in classes or names)
        (tmp_path / "mine.md").write_text(
            f"---\nversion: 1\nnoun: thing\nkind: sort\nsource:\n  kind: archive\n"
            f"  layout: {layout}\n{extra}  files:\n{files}classes:\n{listed}---\n"
        )
        return folder

    return write


@pytest.mark.parametrize("layout", CASES)
def test_the_real_layout_becomes_images_with_class_and_split(card, tmp_path, layout):
    _, _, wanted, _ = CASES[layout]
    archives = card(layout)
    out = tmp_path / "out"
    out.mkdir()
    run_stage(download, out, card="mine", max_reject_share=0.0, archives=archives)
    rows = shards.read(out, "images").to_pylist()
    found = [(Path(r["image"]["path"]).name, r["label"], r["official_split"]) for r in rows]
    assert found == wanted
    assert len({row["image_id"] for row in rows}) == len(rows), "ids must not collide"
    height = 20 if layout == "aircraft" else 40
    assert {row["height"] for row in rows} == {height}
    for row in rows:
        assert Image.open(io.BytesIO(row["image"]["bytes"])).mode == "RGB"
    assert not (out / "unpacked").exists()


@pytest.mark.parametrize("layout", CASES)
def test_a_layout_can_be_split_and_its_official_test_images_stay_test(card, tmp_path, layout):
    archives = card(layout)
    out, parts = tmp_path / "out", tmp_path / "parts"
    out.mkdir()
    parts.mkdir()
    run_stage(download, out, card="mine", max_reject_share=0.0, archives=archives)
    run_stage(split, parts, card="mine", download=out, protocol="base_to_novel", seed=0,
          test_share=0.2, val_share=0.0, pretrain_share=0.0)  # fmt: skip
    official = {r["image_id"]: r["official_split"] for r in shards.read(out, "images").to_pylist()}
    for row in shards.read(parts, "split").to_pylist():
        assert (row["split"] == "test") == (official[row["image_id"]] == "test")


def test_an_image_that_is_listed_but_missing_is_a_reject_with_its_name(card, tmp_path):
    archives = card("cub")
    path = archives / "CUB_200_2011.tgz"
    with tarfile.open(path) as archive:
        files = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    gone = "CUB_200_2011/images/002.Laysan_Albatross/c.jpg"
    del files[gone]
    old = hashlib.md5(path.read_bytes()).hexdigest()
    pack(path, files)
    text_ = (tmp_path / "mine.md").read_text()
    (tmp_path / "mine.md").write_text(
        text_.replace(old, hashlib.md5(path.read_bytes()).hexdigest())
    )
    out = tmp_path / "out"
    out.mkdir()
    run_stage(download, out, card="mine", max_reject_share=0.3, archives=archives)
    rejects = shards.read_file(out / "rejects.parquet").to_pylist()
    assert rejects == [{"path": gone, "reason": "listed, but there is no such file"}]


def test_archives_of_another_layout_are_told_apart_by_what_is_missing(tmp_path):
    for layout in CASES:
        with pytest.raises(StageError, match=rf"is missing: .* not have the layout '{layout}'"):
            layouts.entries(layout, tmp_path, ["a", "b"])


def test_a_class_that_the_card_does_not_list_is_an_error(card, tmp_path):
    archives = card("aircraft", ["707-320", "F-16"])
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match="the card has no class 'F/A-18'"):
        run_stage(download, tmp_path / "out", card="mine", max_reject_share=0.0, archives=archives)


def test_lists_that_do_not_fit_together_are_an_error(tmp_path):
    top = tmp_path / "CUB_200_2011"
    top.mkdir()
    (top / "images.txt").write_text("1 a.jpg\n2 b.jpg\n")
    (top / "image_class_labels.txt").write_text("1 1\n")
    (top / "train_test_split.txt").write_text("1 1\n2 0\n")
    with pytest.raises(StageError, match="do not fit together"):
        layouts.entries("cub", tmp_path, ["a", "b"])
    (top / "image_class_labels.txt").write_text("1 1\n2 9\n")
    with pytest.raises(StageError, match=r"b\.jpg is of class 9, but the card lists 2 classes"):
        layouts.entries("cub", tmp_path, ["a", "b"])


def test_the_loader_and_the_readers_know_the_same_layouts():
    assert set(data_cards.LAYOUTS) == set(layouts.LAYOUTS) == set(CASES)
