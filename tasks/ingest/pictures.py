"""Normalises one image file, so that every library decodes it alike, and takes its fingerprints.

An upright RGB JPEG or PNG keeps its bytes. Any other image is re-encoded without loss as a PNG of
what a person sees: rotated by EXIF, alpha on white, 8-bit RGB, first frame.
"""

import hashlib
import io
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_000_000  # as many as Pillow opens without a warning
# Pixels from which on one picture is decoded at a time: it takes 3 bytes a pixel, twice over.
LARGE = 12_000_000
_one_large = threading.Lock()

# Floating-point grey is taken as shares of white up to here, and as levels of 0 to 255 above.
LOWEST_LEVELS = 16

# Levels by which a cell must be brighter than its right neighbour; less is noise of the encoding.
CONTRAST = 2


class Reject(Exception):
    """The file is no usable image; the message is the reason that is recorded for it."""


class Picture(NamedTuple):
    """A usable image: its bytes, its size in pixels, and two fingerprints of its content.

    `pixels` is the xxh3-128 of size and RGB values, in hex: equal for equal pictures, however they
    are stored. `dhash` is the 64-bit difference hash as a signed integer: its Hamming distance is
    small for pictures that look alike.
    """

    data: bytes
    width: int
    height: int
    pixels: str
    dhash: int


def normalise_image(data: bytes, crop_bottom: int = 0) -> Picture:
    """The picture that `data` holds; the lowest `crop_bottom` pixel rows are cut off.

    Raises Reject with the reason when the bytes are no picture, a truncated one, or one of more
    than MAX_PIXELS.
    """
    if not data:
        raise Reject("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (count := image.width * image.height) > MAX_PIXELS:
                raise Reject(f"{count:,} pixels, more than {MAX_PIXELS:,}")
            with _one_large if count > LARGE else nullcontext():
                data, rgb = _read(image, data, crop_bottom)
    except (Reject, MemoryError):  # a lack of memory says nothing about the picture
        raise
    except UnidentifiedImageError as error:
        raise Reject(_unknown(data)) from error
    except Image.DecompressionBombError as error:
        raise Reject("too many pixels (decompression bomb)") from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise Reject(f"{type(error).__name__}: {error}"[:200]) from error
    seen = xxhash.xxh3_128(f"{rgb.width}x{rgb.height}".encode())
    seen.update(rgb.tobytes())
    return Picture(data, rgb.width, rgb.height, seen.hexdigest(), difference_hash(rgb))


def open_picture(load: Callable[[], bytes], crop_bottom: int = 0) -> Picture | Reject:
    """The picture in the bytes that `load` returns, or the Reject with the reason."""
    try:
        return normalise_image(load(), crop_bottom)
    except Reject as reason:
        return reason


def image_row(
    image_id: str, path: str, label: int, official_split: str, picture: Picture
) -> dict[str, Any]:
    """A picture as a row of the images table."""
    return {
        "image_id": image_id,
        "image": {"bytes": picture.data, "path": path},
        "sha256": hashlib.sha256(picture.data).hexdigest(),
        "pixels": picture.pixels,
        "dhash": picture.dhash,
        "width": picture.width,
        "height": picture.height,
        "label": label,
        "official_split": official_split,
    }


def difference_hash(rgb: Image.Image) -> int:
    """The difference hash (dHash): for each cell of an 8 x 8 grid, whether it is brighter than the next."""
    cells = rgb.resize((9, 8), Image.Resampling.BOX, reducing_gap=1.0).convert("L").tobytes()
    bits = 0
    for row in range(0, 72, 9):
        for left, right in zip(cells[row : row + 8], cells[row + 1 : row + 9], strict=True):
            bits = bits << 1 | (left > right + CONTRAST)
    # As a signed integer of 64 bits, the widest one that all Parquet readers share.
    return bits - (bits >> 63 << 64)


def _unknown(data: bytes) -> str:
    """Why Pillow knows no format for these bytes."""
    if data[4:8] == b"ftyp" and data[8:12] in (
        b"heic",
        b"heix",
        b"hevc",
        b"heim",
        b"heis",
        b"mif1",
    ):
        return (
            "HEIC, which Pillow cannot read; convert it to JPEG, as with: heif-convert a.heic a.jpg"
        )
    if data[4:11] == b"ftypcrx":
        return (
            "a camera's raw file (CR3); convert it to JPEG with the camera's program or darktable"
        )
    if data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ":
        return "JPEG XL, which Pillow cannot read; convert it to JPEG, as with: djxl a.jxl a.jpg"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF whose pixels Pillow cannot read; save it with 8 or 16 bits a channel"
    return "not an image in a known format"


def _read(image: Image.Image, data: bytes, crop_bottom: int) -> tuple[bytes, Image.Image]:
    """(bytes to keep, decoded RGB picture)."""
    if image.format == "PNG":  # decoding alone accepts some damaged files: check the checksums
        with Image.open(io.BytesIO(data)) as chunks:
            chunks.verify()
    image.load()
    _refuse_negative(image)
    upright = image.getexif().get(0x0112, 1) == 1
    plain = image.format in ("JPEG", "PNG") and getattr(image, "n_frames", 1) == 1
    as_is = image.mode == "RGB" and upright and plain and "transparency" not in image.info
    rgb = image
    if not as_is or crop_bottom:
        rgb = to_rgb(ImageOps.exif_transpose(image))
        if rgb.height <= crop_bottom:
            raise Reject(f"only {rgb.height} pixels high, banner included")
        rgb = rgb.crop((0, 0, rgb.width, rgb.height - crop_bottom))
        buffer = io.BytesIO()
        rgb.save(buffer, "PNG")
        data = buffer.getvalue()
    return data, rgb


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB. Grey of more bits keeps its range, transparency becomes white.

    Raises Reject for numbers that no brightness follows from: below 0, or not finite.
    """
    _refuse_negative(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled(image.convert("I") if image.mode.startswith("I;16") else image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _refuse_negative(image: Image.Image) -> None:
    """Raise Reject for a TIFF of more than 8 bits in which 0 is white, which Pillow does not turn round."""
    if image.mode[0] in "IF" and getattr(image, "tag_v2", {}).get(0x0106) == 0:
        raise Reject("a grey TIFF in which 0 is white; save it with 8 bits a channel")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits as RGB. Pillow's own conversion would clip all above 255 to white.

    Up to 255 values are levels as they are; floating-point ones up to 1 are shares of white. Where
    values are higher, the highest is white: also in floating-point ones up to LOWEST_LEVELS, which
    are shares with lights above white, and would be black as levels.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise Reject("grey values that are not finite")
    if (lowest := values.min()) < 0:
        raise Reject(f"grey values from {lowest:g}, of which none is black; save it with 8 bits")
    highest = float(values.max())
    scale = 255 / highest if highest > 255 else 1
    if image.mode == "F" and highest <= LOWEST_LEVELS:
        scale = 255 / max(highest, 1)
    return image.convert("F").point(lambda value: value * scale).convert("L").convert("RGB")
