"""The embedded dataset: beetles drawn from a seed, so that the pipeline runs without a download.

A species is a combination of a body hue and a belt hue. All else (pose, size, light, clutter, blur,
noise) is random, and the hues vary as well, so that neighbouring species are lookalikes: a policy
often has the right name among its guesses, and still says a wrong one first.

Every image has its own generator, seeded with (seed, split, class id, index): the same call gives
the same pixels, whatever was drawn before.
"""

import colorsys
import hashlib
import math
import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Hue in turns, saturation, value: the middle of each colour; `HUE_JITTER` spreads around it.
BODIES = {
    "rose": (0.895, 0.58, 0.80),
    "crimson": (0.985, 0.82, 0.70),
    "amber": (0.085, 0.90, 0.86),
    "olive": (0.185, 0.72, 0.56),
    "emerald": (0.375, 0.78, 0.58),
    "teal": (0.485, 0.80, 0.56),
    "azure": (0.585, 0.80, 0.74),
    "violet": (0.725, 0.62, 0.66),
}
BELTS = {
    "gold": (0.125, 0.85, 0.95),
    "lime": (0.255, 0.80, 0.90),
    "cyan": (0.505, 0.70, 0.95),
    "indigo": (0.665, 0.75, 0.80),
    "coral": (0.025, 0.72, 0.97),
}
HUE_JITTER = 0.028  # standard deviation in turns; neighbouring bodies are about 0.11 apart
BELT_JITTER = 0.042
SCALE = 2  # drawn at twice the size and then reduced, for smooth edges

# Base and novel species form a checkerboard over (pair of neighbouring body hues, belt hue). So both
# groups show every colour, and only the combinations are new. Each base species has its lookalike of
# the neighbouring hue among the base species, so that training can offer it beside the truth. The
# first half of the classes is the base group.
_GRID = [(body, belt) for body in BODIES for belt in BELTS]
_COLOUR = {
    pair: (list(BODIES).index(pair[0]) // 2 + list(BELTS).index(pair[1])) % 2 for pair in _GRID
}
SPECIES = tuple(sorted(_GRID, key=lambda pair: (_COLOUR[pair], _GRID.index(pair))))
CLASSES = tuple(f"{body} {belt}-belt" for body, belt in SPECIES)


def draw(class_id: int, index: int, seed: int, split: str, *, size: int = 84) -> Image.Image:
    """One beetle of class `class_id`: an RGB image of `size` x `size` pixels."""
    key = hashlib.sha256(f"beetles {seed} {split} {class_id} {index}".encode()).digest()
    rng = random.Random(key)
    body, belt = SPECIES[class_id]
    side = size * SCALE
    ground = Image.new("RGB", (side, side), _rgb(rng, (rng.uniform(0.06, 0.32), 0.30, 0.50), 0.02))
    _clutter(ground, rng)
    beetle = _beetle(
        side, _hsv(rng, BODIES[body], HUE_JITTER), _hsv(rng, BELTS[belt], BELT_JITTER), rng
    )
    shift = [round(rng.uniform(-0.07, 0.07) * side) for _ in range(2)]
    beetle = beetle.rotate(rng.uniform(-35, 35), Image.Resampling.BILINEAR, translate=tuple(shift))
    shadow = beetle.getchannel("A").point(lambda value: value // 3)
    ground.paste((20, 16, 10), (side // 50, side // 40), shadow)
    ground.paste(beetle, (0, 0), beetle)
    image = ground.reduce(SCALE).filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 0.9)))
    light = rng.uniform(0.78, 1.15)
    noise = np.random.default_rng(rng.getrandbits(63)).normal(
        0, rng.uniform(4, 13), (size, size, 3)
    )
    pixels = np.asarray(image, dtype=np.float32) * light + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _clutter(ground: Image.Image, rng: random.Random) -> None:
    """Draw leaves and pebbles, in colours close to those of the beetles."""
    pen = ImageDraw.Draw(ground)
    side = ground.width
    for _ in range(rng.randint(4, 7)):
        x, y, angle = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0, math.tau)
        length, width = rng.uniform(0.2, 0.5) * side, rng.uniform(0.05, 0.12) * side
        leaf = _rgb(rng, (rng.uniform(0.05, 0.40), 0.45, 0.48), 0.03)
        pen.polygon(_leaf(x, y, angle, length, width), fill=leaf)
        tip = (x + length * math.cos(angle), y + length * math.sin(angle))
        pen.line([(x, y), tip], fill=tuple(value * 3 // 4 for value in leaf), width=2)
    for _ in range(rng.randint(3, 6)):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.015, 0.05) * side
        pebble = _rgb(rng, (rng.random(), 0.25, 0.55), 0.0)
        pen.ellipse([x - r, y - r * 0.8, x + r, y + r * 0.8], fill=pebble)


def _beetle(side: int, body: tuple, belt: tuple, rng: random.Random) -> Image.Image:
    """The beetle alone, head up, on a transparent ground."""
    layer = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    half = rng.uniform(0.17, 0.215) * side  # half the width of the body
    length = half * rng.uniform(1.32, 1.55)  # half its length
    cx = side / 2
    cy = side * 0.56
    dark, ink = _shade(body, 0.42), (34, 26, 24, 255)
    for turn in (-1, 1):
        for number, slope in enumerate((-0.75, 0.05, 0.8)):  # three pairs of jointed legs
            y = cy + length * (-0.45 + 0.42 * number)
            knee = (cx + turn * half * 1.45, y + half * slope * 0.6)
            foot = (cx + turn * half * rng.uniform(1.65, 1.95), y + half * (slope * 1.25 + 0.25))
            pen.line([(cx + turn * half * 0.7, y), knee, foot], fill=ink, width=max(2, side // 48))
        tip = cy - length - half * rng.uniform(1.15, 1.45)
        feeler = [
            (cx + turn * half * 0.2, cy - length - half * 0.4),
            (cx + turn * half * 0.42, cy - length - half * 0.85),
            (cx + turn * half * rng.uniform(0.75, 1.05), tip),
        ]
        pen.line(feeler, fill=ink, width=max(2, side // 64))
        _dot(pen, *feeler[-1], side / 70, ink)
    _oval(pen, cx, cy - length - half * 0.22, half * 0.48, half * 0.42, (*ink[:3], 255))
    for turn in (-1, 1):
        _dot(
            pen,
            cx + turn * half * 0.36,
            cy - length - half * 0.36,
            half * 0.13,
            (235, 235, 220, 255),
        )
        _dot(pen, cx + turn * half * 0.38, cy - length - half * 0.39, half * 0.07, ink)
    _oval(pen, cx, cy - length * 0.78, half * 0.74, half * 0.52, dark)  # pronotum
    _oval(pen, cx, cy, half, length, _shade(body, 0.6))  # rim of the wing cases
    _oval(pen, cx, cy, half * 0.93, length * 0.95, _shade(body, 1.0))
    top = rng.uniform(-0.06, 0.16)
    thick = rng.uniform(0.15, 0.22)
    pen.polygon(
        _slice(cx, cy, half * 0.93, length * 0.95, top - thick, top + thick), fill=_shade(belt, 1.0)
    )
    pen.line([(cx, cy - length * 0.92), (cx, cy + length * 0.95)], fill=_shade(body, 0.4), width=2)
    shine = tuple(round(0.6 * value + 0.4 * 255) for value in _shade(body, 1.0))
    _oval(pen, cx - half * 0.42, cy - length * 0.45, half * 0.20, length * 0.24, shine)
    return layer


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


def _dot(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Any) -> None:
    _oval(pen, x, y, r, r, fill)


def _hsv(rng: random.Random, middle: tuple, jitter: float) -> tuple:
    hue, saturation, value = middle
    return (
        (hue + rng.gauss(0, jitter)) % 1.0,
        min(1.0, max(0.25, saturation + rng.gauss(0, 0.07))),
        min(1.0, max(0.30, value + rng.gauss(0, 0.06))),
    )


def _rgb(rng: random.Random, middle: tuple, jitter: float) -> tuple:
    return _shade(_hsv(rng, middle, jitter), 1.0)[:3]


def _shade(hsv: tuple, factor: float) -> tuple:
    """A colour as RGBA, with its brightness multiplied by `factor`."""
    hue, saturation, value = hsv
    return (
        *(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value * factor)),
        255,
    )
