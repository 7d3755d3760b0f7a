"""Filled figures, their colours, and the backgrounds that figures and print stand on."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

_HSV = {  # ranges of hue in degrees, saturation and value, with clear gaps between the colours
    "red": ((352, 364), (0.85, 1.0), (0.75, 1.0)),
    "green": ((105, 145), (0.7, 1.0), (0.42, 0.95)),
    "blue": ((208, 242), (0.75, 1.0), (0.6, 1.0)),
    "yellow": ((50, 60), (0.8, 1.0), (0.92, 1.0)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.03), (0.96, 1.0)),
    "orange": ((24, 38), (0.88, 1.0), (0.92, 1.0)),
    "purple": ((270, 300), (0.6, 1.0), (0.45, 0.75)),
}
_NEAREST = 55  # least distance in CIE L*a*b* between a figure and its background
_SMOOTHING = 3  # sub-pixels along each axis


def named_colour(rng: Random, name: str, difficulty: float) -> RGB:
    """Draws a shade of a named colour; the harder, the further from its middle."""
    spread = 0.15 + 0.35 * difficulty
    hue, saturation, value = (low + (high - low) * rng.uniform(0.5 - spread, 0.5 + spread) for low, high in _HSV[name])
    return tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value))


def stands_out(figure: RGB, background: RGB) -> bool:
    """Whether a figure of this colour is clearly seen on this background, and its colour not in doubt."""
    first, second = _lab(figure), _lab(background)
    if (first[0] > 95 and second[0] > 65) or (first[0] < 15 and second[0] < 45):  # white on light, black on dark
        return False
    return math.dist(first, second) >= _NEAREST


def background(
    rng: Random, size: tuple[int, int], draw: Callable[[], RGB], accept: Callable[[RGB], bool], difficulty: float
) -> tuple[Image.Image, bool]:
    """Paints a background; the harder, the more often with a slight gradient or noise.

    Args:
      rng: the source of all chance.
      size: width and height in pixels.
      draw: draws a colour, until one is accepted.
      accept: whether what stands on it contrasts with a colour.
      difficulty: from 0 to 1.

    Returns:
      The RGB picture, and whether it is flat.
    """
    shift = 36 if rng.random() < 0.4 * difficulty else 0
    noise = rng.randint(2, 12) if rng.random() < 0.4 * difficulty else 0
    while True:
        first = draw()
        second = tuple(min(max(c + rng.randint(-shift, shift), 0), 255) for c in first)
        if accept(first) and accept(second):
            break
    image = _gradient(rng, size, first, second) if shift else Image.new("RGB", size, first)
    return _noisy(rng, image, noise) if noise else image, not (shift or noise)


def figure_mask(shape: str, side: float, angle: float) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Draws a filled figure.

    Args:
      shape: one of SHAPES.
      side: longer side of its box before the rotation, in pixels.
      angle: rotation in degrees, counterclockwise.

    Returns:
      Its mask, mode L, cut tight, and its box (x0, y0, x1, y1) in the mask.
    """
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    points = np.array(_outline(shape)) @ np.array([[cosine, -sine], [sine, cosine]]) * side
    points -= points.min(0)
    width, height = points.max(0)
    mask = Image.new("L", (math.ceil(width) * _SMOOTHING, math.ceil(height) * _SMOOTHING))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in points * _SMOOTHING], fill=255)
    return mask.reduce(_SMOOTHING), (0.0, 0.0, float(width), float(height))


@functools.cache
def _outline(shape: str) -> list[Point]:
    """Returns the corners of a figure whose box has a longer side of 1, y pointing down."""
    points = np.array(_OUTLINES[shape](), float)
    points -= points.min(0)
    points /= points.max()
    return [tuple(p) for p in points]


def _circle() -> list[Point]:
    return [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 96, endpoint=False)]


def _star() -> list[Point]:
    turns = [(math.pi * i / 5 - math.pi / 2, 1.0 if i % 2 == 0 else 0.4) for i in range(10)]
    return [(r * math.cos(t), r * math.sin(t)) for t, r in turns]


def _cross() -> list[Point]:
    a, b = 1.0, 0.32
    return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]


def _heart() -> list[Point]:
    def height(t: float) -> float:
        return -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))

    return [(16 * math.sin(t) ** 3, height(t)) for t in np.linspace(0, 2 * math.pi, 96, endpoint=False)]


_OUTLINES: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": lambda: [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": lambda: [(0.5, 0), (1, 0.9), (0, 0.9)],
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def _lab(colour: RGB) -> tuple[float, float, float]:
    """Converts sRGB to CIE L*a*b*, white D65."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    rows = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0178, 0.1095, 0.8730))  # over the white point
    xyz = (sum(m * v for m, v in zip(row, linear, strict=True)) for row in rows)
    x, y, z = (math.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _gradient(rng: Random, size: tuple[int, int], first: RGB, second: RGB) -> Image.Image:
    corners = Image.new("RGB", (2, 2))
    other = rng.random()
    middle = tuple(round(a + (b - a) * other) for a, b in zip(first, second, strict=True))
    corners.putdata([first, middle, middle, second])
    return corners.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _noisy(rng: Random, image: Image.Image, amplitude: int) -> Image.Image:
    grain = np.frombuffer(rng.randbytes(image.width * image.height), np.uint8) % (2 * amplitude + 1)
    grain = grain.reshape(image.height, image.width, 1).astype(np.int16) - amplitude
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
