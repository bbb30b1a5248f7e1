"""Every picture becomes what a person sees; what is no picture is refused with a reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data_cards
from tasks.download import download
from tasks.evaluation.prediction import read_image
from tasks.ingest import pictures
from tasks.ingest.pictures import Reject, difference_hash, normalise_image
from tasks.tables import shards
from tests.conftest import run_stage


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size=(40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


def photograph(seed: int, size=(120, 90)) -> Image.Image:
    """Soft patches of colour: like a photograph, and like no other seed's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_plain_pictures_keep_their_bytes(form):
    data = encoded(picture(), form)
    assert normalise_image(data)[:3] == (data, 40, 30)


def test_a_photo_rotated_by_its_exif_tag_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data, width, height, *_ = normalise_image(encoded(picture(), exif=exif))
    assert (width, height) == (30, 40)
    assert opened(data).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture("CMYK")),
        encoded(picture("L")),
        encoded(picture("P"), "PNG"),
        encoded(picture("I;16"), "PNG"),
        encoded(picture(), "GIF"),
        encoded(picture(), "WEBP"),
        encoded(picture(), "GIF", save_all=True, append_images=[picture()]),
    ],
    ids=["cmyk", "gray", "palette", "16-bit", "gif", "webp", "animated"],
)
def test_odd_pictures_become_rgb(data):
    out, width, height, *_ = normalise_image(data)
    image = opened(out)
    assert (image.mode, image.size) == ("RGB", (40, 30)) == ("RGB", (width, height))


def test_sixteen_bit_gray_keeps_its_range():
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 0)
    deep.putpixel((1, 0), 60000)
    image = opened(normalise_image(encoded(deep, "PNG"))[0])
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((1, 0)) == (255, 255, 255)


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert opened(normalise_image(encoded(clear, "PNG"))[0]).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "known format"),
        (encoded(picture())[:300], "."),
        (encoded(picture(), "PNG")[:60], "."),
    ],
)
def test_what_is_no_picture_is_rejected_with_a_reason(data, reason):
    with pytest.raises(Reject, match=reason):
        normalise_image(data)


def test_a_decompression_bomb_is_rejected(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Reject, match="bomb"):
        normalise_image(encoded(picture()))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_they_take_memory(monkeypatch, form):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    with pytest.raises(Reject, match="1,200 pixels, more than 1,000"):
        normalise_image(encoded(picture(), form))


def test_the_same_pixels_have_one_fingerprint_however_they_are_stored():
    jpeg = encoded(photograph(1))
    png = encoded(opened(jpeg), "PNG")
    remark = b"\xff\xfe\x00\x08remark"  # a comment segment, which changes no pixel
    found = {normalise_image(data).pixels for data in (jpeg, png, jpeg[:2] + remark + jpeg[2:])}
    assert len(found) == 1
    assert normalise_image(encoded(photograph(2))).pixels not in found
    turned = opened(jpeg).resize((90, 120))
    assert normalise_image(encoded(turned, "PNG")).pixels not in found


def test_the_difference_hash_is_near_for_copies_and_far_for_others():
    original = photograph(3, (400, 300))
    bits = difference_hash(original)
    assert -(2**63) <= bits < 2**63

    def apart(other: Image.Image) -> int:
        return ((bits ^ difference_hash(other)) & (2**64 - 1)).bit_count()

    assert apart(original.resize((200, 150))) <= 4
    assert apart(opened(encoded(original, quality=40))) <= 4
    assert min(apart(photograph(seed, (400, 300))) for seed in range(10, 40)) > 12


def test_a_flat_picture_is_like_a_slightly_noisy_one():
    flat = Image.new("L", (64, 64), 100)
    noise = np.random.default_rng(0).integers(99, 102, (64, 64)).astype(np.uint8)
    assert difference_hash(flat.convert("RGB")) == 0
    assert difference_hash(Image.fromarray(noise).convert("RGB")) == 0


def bomb(rng: random.Random) -> bytes:
    """A PNG of a few hundred bytes that says it has ten thousand million pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"IDAT", zlib.compress(bytes(rng.randrange(9, 99)))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def broken(form: str):
    """A picture of this format, cut somewhere in its middle."""

    def cut(rng: random.Random) -> bytes:
        data = encoded(photograph(rng.randrange(99)), form)
        return data[: int(len(data) * rng.uniform(0.3, 0.8))]

    return cut


def flipped(rng: random.Random) -> bytes:
    """A PNG whose pixel data has a wrong checksum."""
    data = bytearray(encoded(photograph(rng.randrange(99)), "PNG"))
    where = data.index(b"IDAT") + rng.randrange(40, 400)
    data[where] ^= 1 + rng.randrange(255)
    return bytes(data)


KINDS = {
    "empty": lambda rng: b"",
    "text": lambda rng: b"no picture " * rng.randrange(1, 50),
    "page": lambda rng: b"<!doctype html><title>404</title>" + b"<p>" * rng.randrange(99),
    "noise": lambda rng: rng.randbytes(rng.randrange(1, 3000)),
    "noise as jpeg": lambda rng: b"\xff\xd8\xff\xe0\x00\x10JFIF" + rng.randbytes(500),
    "noise as png": lambda rng: b"\x89PNG\r\n\x1a\n" + rng.randbytes(500),
    "matrix": lambda rng: b"MATLAB 5.0 MAT-file" + rng.randbytes(400),
    "bomb": bomb,
    "cut jpeg": broken("JPEG"),
    "cut png": broken("PNG"),
    "cut webp": broken("WEBP"),
    "flipped png": flipped,
}


def test_twelve_kinds_of_bad_file_a_hundred_of_each_are_all_rejected_and_named(
    tmp_path, monkeypatch
):
    assert len(KINDS) == 12
    rng = random.Random(0)
    for name in ("kite", "buzzard"):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(5):
            (folder / f"good-{i}.jpg").write_bytes(encoded(photograph(i)))
        for kind, make in KINDS.items():
            for i in range(50):
                (folder / f"{kind}-{i}.jpg").write_bytes(make(rng))
    (tmp_path / "mine.md").write_text(
        "---\nversion: 1\nnoun: bird\nkind: species\n"
        f"source: {{kind: folder, path: {tmp_path / 'photos'}}}\nclasses: [kite, buzzard]\n---\n"
    )
    monkeypatch.setattr(data_cards, "FOLDER", tmp_path)
    (tmp_path / "out").mkdir()
    run_stage(download, tmp_path / "out", card="mine", max_reject_share=1.0)
    rejects = shards.read(tmp_path / "out", "rejects").to_pylist()
    assert len(rejects) == 1200
    assert all(row["reason"] for row in rejects)
    assert not [row for row in rejects if "good" in row["path"]]
    kept = shards.read(tmp_path / "out", "images")["image_id"].to_pylist()
    assert len(kept) == 10
    assert all("good" in image_id for image_id in kept)


def tiff(values: np.ndarray, order: str, form: int, black: int = 1) -> bytes:
    """An uncompressed grey TIFF: byte order < or >, sample format 1 unsigned, 2 signed, 3 float.

    `black` is 1 where 0 is black, and 0 where 0 is white.
    """
    rows, columns = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, columns), (257, rows), (258, 8 * values.itemsize), (259, 1), (262, black)]
    tags += [(273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, rows), (279, len(data)), (339, form)]
    packed = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, len(tags)) + packed + bytes(4) + data


RAMP = np.linspace(0, 1, 1200).reshape(30, 40)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "form", "highest"),
    [
        ("f4", 3, 1),
        ("f4", 3, 1.2),
        ("f4", 3, 12),
        ("f4", 3, 255),
        ("f4", 3, 65535),
        ("u2", 1, 60000),
        ("i2", 2, 30000),
        ("i4", 2, 2_000_000_000),
        ("u1", 1, 255),
    ],
)
def test_grey_of_any_depth_and_byte_order_keeps_its_range(order, kind, form, highest):
    image = opened(normalise_image(tiff((RAMP * highest).astype(kind), order, form)).data)
    assert [image.getpixel(at) for at in ((0, 0), (39, 29))] == [(0, 0, 0), (255, 255, 255)]
    assert 126 <= image.getpixel((0, 15))[0] <= 128


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("values", "form", "reason"),
    [
        ((RAMP * 2 - 1).astype("f4"), 3, "grey values from -1, of which none is black"),
        ((RAMP * 2000 - 1000).astype("i4"), 2, "grey values from -1000, of which"),
        (np.where(RAMP > 0.9, np.nan, RAMP).astype("f4"), 3, "not finite"),
        (np.where(RAMP > 0.9, np.inf, RAMP).astype("f4"), 3, "not finite"),
        (RAMP.astype("f8"), 3, "a TIFF whose pixels Pillow cannot read; save it with 8 or 16"),
        ((RAMP * 4e9).astype("u4"), 1, "grey values from|a TIFF whose pixels"),
    ],
)
def test_grey_without_a_known_black_and_white_is_rejected(order, values, form, reason):
    with pytest.raises(Reject, match=reason):
        normalise_image(tiff(values, order, form))


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_in_which_zero_is_white_is_never_a_negative(order):
    levels = normalise_image(tiff((RAMP * 255).astype("u1"), order, 1, black=0))
    assert opened(levels.data).getpixel((0, 0)) == (255, 255, 255)
    for values, form in (((RAMP * 60000).astype("u2"), 1), (RAMP.astype("f4"), 3)):
        data = tiff(values, order, form, black=0)
        with pytest.raises(Reject, match=r"0 is white|pixels Pillow cannot read"):
            normalise_image(data)
    with Image.open(io.BytesIO(tiff((RAMP * 9).astype("f4"), order, 3, black=0))) as image:
        assert isinstance(read_image(image), Reject)


def test_an_opened_picture_to_predict_is_read_as_download_reads_its_file():
    for image in (Image.fromarray(RAMP.astype("f4")), Image.new("RGBA", (4, 4), (255, 0, 0, 0))):
        data = encoded(image, "TIFF")
        assert read_image(image).pixels == read_image(data).pixels == normalise_image(data).pixels
    assert isinstance(read_image(Image.fromarray(RAMP.astype("f4") - 1)), Reject)
