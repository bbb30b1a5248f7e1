"""The embedded dataset: beetles drawn from a seed, so that the pipeline runs without a download.

A species is a combination of five traits that an eye can see in every picture; its name says nothing
about them. A genus has one body colour and one shape. Its eight species are the combinations of two
kinds of marks, two hues of the marks and two colours of the head, so that they are lookalikes. Pose,
size, light, clutter, blur and noise are chance.

Every picture comes from a local generator seeded by its key: the same call gives the same pixels,
whatever was drawn before.
"""

import colorsys
import hashlib
import itertools
import math
import random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Look = tuple[str, ...]  # one word for each of TRAITS, in that order
Colour = tuple[float, float, float]  # hue in turns, saturation, value


class Genus(NamedTuple):
    """What the eight species of a genus share, and the pairs of traits that tell them apart."""

    body: str
    shape: str
    marks: tuple[str, str]
    hues: tuple[str, str]
    heads: tuple[str, str]
    twins: str  # the trait in which a species differs from its lookalike of the same group
    epithets: str


BODIES: dict[str, Colour] = {
    "crimson": (0.985, 0.82, 0.58),
    "amber": (0.080, 0.90, 0.66),
    "olive": (0.200, 0.74, 0.42),
    "teal": (0.455, 0.80, 0.42),
    "cobalt": (0.605, 0.82, 0.58),
    "violet": (0.775, 0.60, 0.48),
}
SHAPES = {"round": 1.12, "slender": 1.70}  # length to width
MARKS = ("belted", "banded", "spotted", "striped")
HUES: dict[str, Colour] = {
    "lime": (0.295, 0.72, 0.92),
    "cyan": (0.520, 0.66, 0.96),
    "gold": (0.135, 0.82, 0.97),
    "pink": (0.900, 0.48, 0.97),
}
HEADS: dict[str, Colour] = {
    "sooty": (0.080, 0.30, 0.13),
    "rusty": (0.040, 0.88, 0.70),
    "ivory": (0.120, 0.10, 0.93),
    "mint": (0.400, 0.50, 0.86),
}
TRAITS: dict[str, tuple[str, ...]] = {
    "body": tuple(BODIES),
    "shape": tuple(SHAPES),
    "marks": MARKS,
    "hue": tuple(HUES),
    "head": tuple(HEADS),
}
_SPOTS, _BANDS = ("spotted", "striped"), ("belted", "banded")
_GREENS, _WARM = ("lime", "cyan"), ("gold", "pink")
_PALE, _DARK = ("ivory", "mint"), ("sooty", "rusty")
GENERA = {
    "Drovia": Genus("crimson", "round", _SPOTS, _GREENS, _PALE, "hue",
                    "calpa mervo tindra osmeta vulna quessa ilbara zumira"),
    "Kelmar": Genus("amber", "slender", _SPOTS, _GREENS, _PALE, "hue",
                    "adrino fossel narbo helvi tusca jendra lomax ursela"),
    "Ostrix": Genus("teal", "slender", _BANDS, _WARM, _PALE, "marks",
                    "brasca ondin pelvo garim savra ektor mollis tharn"),
    "Pandor": Genus("cobalt", "round", _BANDS, _WARM, _PALE, "marks",
                    "wenda corvo lissa ambrel nuvik dorsey hasta prunel"),
    "Sylvex": Genus("olive", "round", _SPOTS, _WARM, _DARK, "head",
                    "xandri belmo furca rovena kitta arlo simbel yoska"),
    "Turnaxa": Genus("violet", "slender", _SPOTS, _WARM, _DARK, "head",
                     "gaulo pirna medox valti embero tolva rustan nilga"),
}  # fmt: skip
FIELD = (0.6, 1.0)  # how hard the circumstances of the dataset's pictures are, of 0 to 1
JITTER = 0.012  # standard deviation of a trait's hue, in turns
SCALE = 2  # drawn at twice the size and then reduced, for smooth edges


def _species() -> tuple[tuple[str, Look], ...]:
    """Every species and its look; the base group, four of each genus, comes first.

    Of the two traits of a genus that are not `twins`, base species have the first value of both or
    the second of both, and novel species one of each. So every value occurs in both groups, each
    species has a lookalike in its own group, and each combination belongs to one group alone.
    """
    halves: tuple[list[tuple[str, Look]], ...] = ([], [])
    for name, genus in GENERA.items():
        pairs = (genus.marks, genus.hues, genus.heads)
        twins = ("marks", "hue", "head").index(genus.twins)
        combinations = itertools.product((0, 1), repeat=3)
        for bits, epithet in zip(combinations, genus.epithets.split(), strict=True):
            fine = (pair[bit] for pair, bit in zip(pairs, bits, strict=True))
            novel = (sum(bits) - bits[twins]) % 2
            halves[novel].append((f"{name} {epithet}", (genus.body, genus.shape, *fine)))
    return (*halves[0], *halves[1])


SPECIES = _species()
CLASSES = tuple(name for name, _ in SPECIES)


def draw(class_id: int, index: int, seed: int, split: str, *, size: int = 84) -> Image.Image:
    """One beetle of class `class_id` in the field: an RGB image of `size` x `size` pixels."""
    return picture(
        SPECIES[class_id][1], f"{seed} {split} {class_id} {index}", hardness=FIELD, size=size
    )


def picture(look: Look, key: str, *, hardness: tuple[float, float], size: int = 84) -> Image.Image:
    """A beetle that looks like `look`; everything that its traits leave open comes from `key`.

    The circumstances are drawn between two degrees of `hardness`: at 0 a beetle sits upright on
    plain ground, at 1 it is turned, half in clutter, blurred, and in poor light.
    """
    rng = random.Random(hashlib.sha256(f"beetles {key}".encode()).digest())
    hard = rng.uniform(*hardness)
    side = size * SCALE
    tone = (rng.uniform(0.06, 0.36), 0.10 + 0.22 * hard, rng.uniform(0.45, 0.74))
    ground = Image.new("RGB", (side, side), _rgb(rng, tone, 0.02))
    _clutter(ground, rng, hard)
    beetle = _beetle(side, look, rng)
    reach = 0.02 + 0.045 * hard
    shift = tuple(round(rng.uniform(-reach, reach) * side) for _ in range(2))
    angle = rng.uniform(-1, 1) * (4 + 31 * hard)
    beetle = beetle.rotate(angle, Image.Resampling.BILINEAR, translate=shift)
    shadow = beetle.getchannel("A").point(lambda value: value // 3)
    ground.paste((20, 16, 10), (side // 50, side // 40), shadow)
    ground.paste(beetle, (0, 0), beetle)
    if rng.random() < hard - 0.3:
        _blade(ground, rng)
    image = ground.reduce(SCALE).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.3 + 0.8 * hard)))
    light = 1 + rng.uniform(-0.10 - 0.22 * hard, 0.08 + 0.12 * hard)
    cast = np.array([1 + rng.uniform(-0.14, 0.14) * hard for _ in range(3)], np.float32)
    noise = np.random.default_rng(rng.getrandbits(63)).normal(
        0, 2 + rng.uniform(3, 16) * hard, (size, size, 3)
    )
    pixels = np.asarray(image, dtype=np.float32) * light * cast + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _clutter(ground: Image.Image, rng: random.Random, hard: float) -> None:
    """Draw leaves and pebbles below the beetle."""
    pen = ImageDraw.Draw(ground)
    side = ground.width
    for _ in range(round(rng.uniform(2, 8) * hard)):
        x, y, angle = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, math.tau)
        length, width = rng.uniform(0.2, 0.5) * side, rng.uniform(0.05, 0.12) * side
        leaf = _rgb(rng, (rng.uniform(0.05, 0.40), 0.45, 0.48), 0.03)
        pen.polygon(_leaf(x, y, angle, length, width), fill=leaf)
    for _ in range(round(rng.uniform(2, 6) * hard)):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.015, 0.05) * side
        _oval(pen, x, y, r, r * 0.8, _rgb(rng, (rng.random(), 0.25, 0.55), 0.0))


def _blade(ground: Image.Image, rng: random.Random) -> None:
    """Draw a blade of grass across the beetle."""
    side = ground.width
    x, y = (rng.uniform(0.1, 0.9) * side for _ in range(2))
    outline = _leaf(x, y, rng.uniform(0, math.tau), rng.uniform(0.3, 0.5) * side, 0.045 * side)
    grass = _rgb(rng, (rng.uniform(0.15, 0.40), 0.45, 0.42), 0.03)
    ImageDraw.Draw(ground).polygon(outline, fill=grass)


def _beetle(side: int, look: Look, rng: random.Random) -> Image.Image:
    """The beetle alone, head up, on a transparent ground."""
    body, shape, marks, hue, head = look
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    half = rng.uniform(0.20, 0.23) * side * (1.08 if shape == "round" else 0.90)
    length = half * SHAPES[shape] * rng.uniform(0.95, 1.05)  # half of it
    cx, cy = side / 2, side * 0.56
    coat = _hsv(rng, BODIES[body], JITTER)
    ink = (34, 26, 24, 255)
    top = cy - length - half * 0.16  # the middle of the head
    for turn in (-1, 1):
        for number, slope in enumerate((-0.75, 0.05, 0.8)):  # three pairs of jointed legs
            y = cy + length * (-0.45 + 0.42 * number)
            knee = (cx + turn * half * 1.3, y + half * slope * 0.6)
            foot = (cx + turn * half * rng.uniform(1.4, 1.65), y + half * (slope * 1.1 + 0.25))
            pen.line([(cx + turn * half * 0.7, y), knee, foot], fill=ink, width=side // 48)
        tip = (cx + turn * half * rng.uniform(0.6, 0.9), top - half * rng.uniform(0.8, 1.05))
        pen.line([(cx + turn * half * 0.25, top - half * 0.3), tip], fill=ink, width=side // 56)
    _oval(pen, cx, top, half * 0.56, half * 0.46, _rgb(rng, HEADS[head], JITTER))
    _oval(pen, cx, cy, half, length, _shade(coat, 0.6))  # rim of the wing cases
    half, length = half * 0.93, length * 0.95
    _oval(pen, cx, cy, half, length, _shade(coat, 1.0))
    _mark(pen, marks, (cx, cy, half, length), _rgb(rng, HUES[hue], JITTER), rng)
    pen.line([(cx, cy - length), (cx, cy + length)], fill=_shade(coat, 0.4), width=2)
    return layer


def _mark(
    pen: ImageDraw.ImageDraw, marks: str, oval: tuple[float, ...], paint: Any, rng: random.Random
) -> None:
    """Draw the marks on the wing cases, whose outline is `oval`."""
    x, y, rx, ry = oval
    if marks in ("belted", "banded"):  # one broad belt, or two narrow bands
        wide, middles = (0.24, (0.0,)) if marks == "belted" else (0.14, (-0.44, 0.30))
        for middle in middles:
            at = middle + rng.uniform(-0.07, 0.07)
            pen.polygon(_slice(x, y, rx, ry, at - wide, at + wide), fill=paint)
        return
    for turn in (-1, 1):  # three spots, or one stripe, on each wing case
        if marks == "spotted":
            for middle in (-0.50, 0.02, 0.52):
                r = rx * rng.uniform(0.18, 0.22)
                _oval(
                    pen,
                    x + turn * rx * 0.47,
                    y + ry * (middle + rng.uniform(-0.02, 0.02)),
                    r,
                    r,
                    paint,
                )
        else:
            left = x + turn * rx * 0.46 - rx * 0.14
            box = [left, y - ry * 0.72, left + rx * 0.28, y + ry * 0.72]
            pen.rounded_rectangle(box, rx * 0.13, fill=paint)


def _slice(x: float, y: float, rx: float, ry: float, low: float, high: float) -> list[tuple]:
    """The outline of an oval's part between two heights, in units of `ry` from its middle."""
    heights = [low + (high - low) * step / 6 for step in range(7)]
    right = [(x + rx * math.sqrt(1 - h * h), y + ry * h) for h in heights]
    return right + [(2 * x - px, py) for px, py in reversed(right)]


def _leaf(x: float, y: float, angle: float, length: float, width: float) -> list[tuple]:
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    outline = []
    for side in (1, -1):
        for step in range(6)[::side]:
            t = step / 5
            bulge = side * width * math.sin(math.pi * t)
            outline.append(
                (
                    x + along[0] * length * t + across[0] * bulge,
                    y + along[1] * length * t + across[1] * bulge,
                )
            )
    return outline


def _oval(pen: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: Any) -> None:
    pen.ellipse([x - rx, y - ry, x + rx, y + ry], fill=fill)


def _hsv(rng: random.Random, middle: Colour, jitter: float) -> Colour:
    hue, saturation, value = middle
    return (
        (hue + rng.gauss(0, jitter)) % 1.0,
        min(1.0, max(0.0, saturation + rng.gauss(0, 0.04))),
        min(1.0, max(0.0, value + rng.gauss(0, 0.04))),
    )


def _rgb(rng: random.Random, middle: Colour, jitter: float) -> tuple:
    return _shade(_hsv(rng, middle, jitter), 1.0)[:3]


def _shade(colour: Colour, factor: float) -> tuple:
    """A colour as RGBA, with its brightness multiplied by `factor`."""
    hue, saturation, value = colour
    return (
        *(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value * factor)),
        255,
    )
