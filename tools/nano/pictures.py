"""Synthetic pictures with words to be read or a figure to be named, and what each patch of them shows.

python -m tools.nano.pictures OUT.png [--seed 0] draws a contact sheet of rising difficulty.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from phi4mm_jax.config import VisionConfig
from phi4mm_jax.processing.images import image_features, plan_crops
from tools.nano.figures import RGB, background, figure_mask, named_colour, stands_out
from tools.nano.fonts import fonts as training_fonts
from tools.nano.marks import LABEL_NAMES, LABELS, Picture, patch_labels
from tools.nano.typesetting import fit, set_type, turn
from tools.nano.vocabulary import COLOURS, SHAPES, WORDS

TILE = 112
"""Side of the model's crops, in pixels."""
LARGEST = (3 * TILE, 2 * TILE)
"""The largest picture that is drawn, in pixels."""
_CONTRAST = 95  # least difference of luma, from 0 to 255, between print and background
_SMALLEST_FIGURE = 24


def text_picture(
    rng: Random,
    texts: Sequence[str],
    difficulty: float,
    largest: tuple[int, int] = LARGEST,
    fonts: Sequence[str] | None = None,
) -> Picture:
    """Draws a picture of print: dark on light in a square of one tile; the harder, the more everything varies.

    Args:
      rng: the source of all chance.
      texts: what to print, lower-case letters, digits and single spaces; several are stacked or stand side by side.
      difficulty: from 0 to 1.
      largest: most pixels across and down; print that does not fit makes the picture larger.
      fonts: paths of the fonts to choose from; None: those of training.
    """
    file = rng.choice(fonts or training_fonts())
    room, tight = _canvas(rng, difficulty, largest)
    size = rng.uniform(24 - 9 * difficulty, 30 + 14 * difficulty)
    if not tight and rng.random() < 0.8:
        size *= rng.uniform(1, max(min(room[0] / TILE, 1.5 * room[1] / TILE), 1))
    angle = rng.uniform(-5, 5) if rng.random() < 0.6 * difficulty else 0.0
    margin = rng.randint(2, 6)
    smallest = round(17 - 2 * difficulty)
    gap, align = rng.uniform(0.4, 1.2), rng.choice((0, 0.5, 1)) if rng.random() < difficulty else 0.5

    # side by side only if that hardly makes the print smaller
    block = set_type(texts, file, max(round(0.8 * size), smallest), True, gap, align)
    side_by_side = fit(block.size, angle, margin, room) >= 1 and rng.random() < 0.5
    size = max(round(size), smallest)
    while True:
        block = set_type(texts, file, size, side_by_side, gap, align)
        ratio = fit(block.size, angle, margin, room)
        if ratio >= 1 or size == smallest:
            break
        size = max(min(int(size * ratio), size - 1), smallest)

    mask, marks = block.print(), block.marks
    if angle:
        turned = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        marks = [(label, *turn(box, angle, mask.size, turned.size)) for label, *box in marks]
        mask = turned
    canvas = tuple(n + 2 * margin if tight else max(r, n + 2 * margin) for n, r in zip(mask.size, room, strict=True))
    image, ink, flat = _paper_and_ink(rng, canvas, difficulty)
    x, y = (_place(rng, n, r, margin, difficulty) for n, r in zip(mask.size, image.size, strict=True))
    image.paste(ink, (x, y), mask)
    marks = tuple((label, x0 + x, y0 + y, x1 + x, y1 + y) for label, x0, y0, x1, y1 in marks)
    return Picture(image, " ".join(texts), None, marks, size * _scale(*image.size), flat and not angle)


def figure_picture(rng: Random, difficulty: float, largest: tuple[int, int] = LARGEST) -> Picture:
    """Draws a picture of one filled figure that stands out from its background.

    Args:
      rng: the source of all chance.
      difficulty: from 0 to 1.
      largest: most pixels across and down.
    """
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    room, tight = _canvas(rng, difficulty, largest)
    angle = rng.uniform(-10, 10) if rng.random() < 0.6 * difficulty else 0.0
    if tight:
        side = rng.uniform(_SMALLEST_FIGURE, 72)
    else:
        whole = min(room) / (math.cos(math.radians(angle)) + math.sin(math.radians(abs(angle)))) - 2
        low = min(_SMALLEST_FIGURE + 26 * (1 - difficulty), whole)
        side = rng.uniform(low, max(low, whole - 22 * (1 - difficulty)))
    mask, box = figure_mask(shape, side, angle)
    margin = rng.randint(1, 6) if tight else 0
    size = tuple(n + 2 * margin + rng.randint(0, 24) for n in mask.size) if tight else room

    fill = named_colour(rng, colour, difficulty)
    image, flat = background(rng, size, lambda: _any_paper(rng, difficulty), lambda c: stands_out(fill, c), difficulty)
    x, y = (_place(rng, n, r, margin, difficulty) for n, r in zip(mask.size, image.size, strict=True))
    image.paste(fill, (x, y), mask)
    mark = (LABELS[shape], box[0] + x, box[1] + y, box[2] + x, box[3] + y)
    return Picture(image, "", (colour, shape), (mark,), 0.0, flat and not angle)


# --- canvas --------------------------------------------------------------------------------------------------


def _canvas(rng: Random, difficulty: float, largest: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """Draws the size of a picture; the second is whether that is only the limit, and the picture cut tight."""
    if rng.random() >= 0.75 * difficulty:
        return largest, False
    if rng.random() < 0.3:
        return largest, True
    width, height = largest
    return (rng.randint(64, width), rng.randint(32, height)), False


def _place(rng: Random, extent: int, room: int, margin: int, difficulty: float) -> int:
    """Draws where something starts along one axis: roughly centred, or anywhere."""
    slack = max(room - extent - 2 * margin, 0)
    if rng.random() < difficulty:
        return margin + rng.randint(0, slack)
    return margin + round(slack * rng.uniform(0.35, 0.65))


def _scale(width: int, height: int) -> float:
    """Returns how much the picture is enlarged to fill its tiles (`plan_crops`; ours never exceed the most tiles)."""
    return min(math.ceil(n / TILE) * TILE / n for n in (width, height))


def _paper_and_ink(rng: Random, size: tuple[int, int], difficulty: float) -> tuple[Image.Image, RGB, bool]:
    """Paints a background for print; returns it, the colour of the print, and whether the background is flat."""
    if rng.random() < difficulty:
        ink, low = _any_colour(rng), 0
        while 85 < _luma(ink) < 170:  # too few backgrounds contrast with it
            ink = _any_colour(rng)
    else:
        ink, low = _any_colour(rng, 0, 70), 200
    image, flat = background(
        rng, size, lambda: _any_colour(rng, low), lambda c: abs(_luma(c) - _luma(ink)) >= _CONTRAST, difficulty
    )
    return image, ink, flat


def _any_paper(rng: Random, difficulty: float) -> RGB:
    """Draws the background of a figure: any colour if it is hard, else near to white, grey or black."""
    if rng.random() < difficulty:
        return _any_colour(rng)
    grey = rng.choice((245, 225, 128, 20))
    return _any_colour(rng, grey - 10, grey + 10)


def _any_colour(rng: Random, low: int = 0, high: int = 255) -> RGB:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def _luma(colour: RGB) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


# --- contact sheet -------------------------------------------------------------------------------------------


_CELL = (464, 250)
_COLUMNS = 6


def contact_sheet(seed: int, count: int = 48) -> Image.Image:
    """Draws pictures of rising difficulty with their answers, each third one as its crops with the patch labels."""
    config = VisionConfig(hidden_size=1, intermediate_size=1, num_layers=2, num_heads=1, image_size=TILE, patch_size=14)
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0], math.ceil(count / _COLUMNS) * _CELL[1]), (70, 90, 90))
    draw = ImageDraw.Draw(sheet)
    rng = Random(seed)
    for i in range(count):
        difficulty = i / (count - 1)
        largest = (TILE, TILE) if rng.random() < 0.6 else LARGEST
        if i % 4 == 3:
            picture = figure_picture(rng, difficulty, largest)
        else:
            texts = [str(rng.randrange(100)) if rng.random() < 0.3 else rng.choice(WORDS) for _ in range(i % 2 + 1)]
            picture = text_picture(rng, texts, difficulty, largest)
        x, y = i % _COLUMNS * _CELL[0] + 4, i // _COLUMNS * _CELL[1] + 2
        answer = picture.text or " ".join(picture.figure)
        notes = ("plain " if picture.plain else "") + ("large" if picture.large_print else "")
        draw.text((x, y), f"{answer}  {picture.image.width}x{picture.image.height} {notes}", fill="white")
        shown = _labelled_crops(picture, config) if i % 3 == 0 else picture.image
        sheet.paste(shown, (x, y + 14))
    return sheet


def _labelled_crops(picture: Picture, config: VisionConfig) -> Image.Image:
    """Shows the global view, and to its right the tiles, with the names of the labels written over them."""
    plan, side, patch = plan_crops(*picture.image.size, config), config.image_size, config.patch_size
    crops = image_features(picture.image, config).crops
    shown = Image.new("RGB", ((1 + plan.columns) * side + 6, plan.rows * side))
    draw = ImageDraw.Draw(shown)
    for i, (crop, labels) in enumerate(zip(crops, patch_labels(picture, config), strict=True)):
        row, column = divmod(max(i - 1, 0), plan.columns)
        left, top = (0, 0) if i == 0 else ((1 + column) * side + 6, row * side)
        pixels = np.clip(crop.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).astype(np.uint8)
        shown.paste(Image.fromarray(pixels), (left, top))
        for k, label in enumerate(labels):
            if label:
                x, y = left + k % config.patches_per_side * patch, top + k // config.patches_per_side * patch
                draw.rectangle((x, y, x + patch - 1, y + patch - 1), outline="grey" if label < 0 else "magenta")
                draw.text((x + 4, y + 2), LABEL_NAMES[max(label, 0)][:2], fill="magenta", font_size=9)
    return shown


def main() -> None:
    """Writes the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    contact_sheet(args.seed).save(args.out)


if __name__ == "__main__":
    main()
