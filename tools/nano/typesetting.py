"""Print: where each letter of a text comes to stand, and its mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from tools.nano.fonts import load
from tools.nano.marks import LABELS, Mark

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Block:
    """Set type, all coordinates from its top left corner."""

    lines: list[tuple[str, tuple[float, float]]]
    """Texts and where their baselines start."""
    marks: list[Mark]
    size: tuple[int, int]
    file: str
    font_size: int

    def print(self) -> Image.Image:
        """Returns the mask of the print, mode L."""
        mask = Image.new("L", self.size)
        draw = ImageDraw.Draw(mask)
        for text, origin in self.lines:
            draw.text(origin, text, fill=255, font=load(self.file, self.font_size), anchor="ls")
        return mask


def set_type(texts: Sequence[str], file: str, size: int, side_by_side: bool, gap: float, align: float) -> Block:
    """Lays texts out one below or beside the other; `gap` is in font sizes, `align` is 0 for left to 1 for right."""
    font = load(file, size)
    widths = [font.getlength(text) for text in texts]
    lines, x, y = [], 0, 0
    for text, width in zip(texts, widths, strict=True):
        lines.append((text, (x if side_by_side else round(align * (max(widths) - width)), y)))
        x += round(width + gap * size)
        y += 0 if side_by_side else round((0.9 + 0.4 * gap) * size)  # letters reach about one size from top to bottom
    marks = []
    for text, (x, y) in lines:
        for i, letter in enumerate(text):
            if letter != " ":
                start = x + font.getlength(text[: i + 1]) - font.getlength(letter)  # with the kerning before it
                x0, y0, x1, y1 = font.getbbox(letter, anchor="ls")  # as wide as its advance, as high as its ink
                marks.append((LABELS[letter], start + x0, y + y0, start + x1, y + y1))
    boxes = np.array(marks)[:, 1:]
    left, top = (math.floor(v) - 1 for v in boxes[:, :2].min(0))  # one pixel of rim for smoothed edges
    right, bottom = (math.ceil(v) + 1 for v in boxes[:, 2:].max(0))
    return Block(
        [(text, (x - left, y - top)) for text, (x, y) in lines],
        [(label, x0 - left, y0 - top, x1 - left, y1 - top) for label, x0, y0, x1, y1 in marks],
        (right - left, bottom - top),
        file,
        size,
    )


def fit(size: tuple[int, int], angle: float, margin: int, room: tuple[int, int]) -> float:
    """Returns by how much a block must be scaled to fit once it is rotated; it fits if that is 1 or more."""
    sine, cosine = math.sin(math.radians(abs(angle))), math.cos(math.radians(angle))
    width, height = size[0] * cosine + size[1] * sine, size[0] * sine + size[1] * cosine
    return min((room[0] - 2 * margin) / math.ceil(width), (room[1] - 2 * margin) / math.ceil(height))


def turn(box: Sequence[float], angle: float, size: tuple[int, int], new_size: tuple[int, int]) -> Box:
    """Returns the upright box around a box of a mask that is rotated about its centre and grows as it is."""
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    corners = np.array([(x, y) for x in box[0::2] for y in box[1::2]]) - np.array(size) / 2
    turned = corners @ np.array([[cosine, -sine], [sine, cosine]]) + np.array(new_size) / 2
    return (*turned.min(0).tolist(), *turned.max(0).tolist())
