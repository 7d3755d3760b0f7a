"""What stands where in a picture, and what each patch of its crops therefore shows."""

from __future__ import annotations

import dataclasses
import string

import numpy as np
from PIL import Image

from phi4mm_jax.config import VisionConfig
from phi4mm_jax.processing.images import plan_crops
from tools.nano.vocabulary import SHAPES, WORDS

LABEL_NAMES = ("", *string.ascii_lowercase, *string.digits, *SHAPES)
"""What each label class stands for; class 0 is background."""
NUM_LABELS = len(LABEL_NAMES)
IGNORED = -1
"""Label of a patch that is padding."""
LABELS = {name: label for label, name in enumerate(LABEL_NAMES)}
PRINTS = ("", *WORDS, *map(str, range(100)))
"""What can be printed as a whole; class 0 is background. A figure counts as its colour."""

_COVERAGE = 0.25  # of a patch; a mark that covers less counts where its centre lies
_LARGE_PRINT = 24

Mark = tuple[int, float, float, float, float]
"""A label and the box (x0, y0, x1, y1) of its glyph or figure, in pixels of the picture."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with the answers to all questions about it."""

    image: Image.Image
    """RGB."""
    text: str
    """Printed words in reading order, one space between them; "" if none."""
    figure: tuple[str, str] | None
    """Colour and shape."""
    marks: tuple[Mark, ...]
    """Glyphs in reading order, or the figure."""
    print_size: float
    """Font size in pixels of the tile grid, which the model sees; 0 if nothing is printed."""
    plain: bool
    """Flat background and no rotation."""

    @property
    def large_print(self) -> bool:
        """Whether all print is easily large enough to be read."""
        return self.print_size >= _LARGE_PRINT


def patch_labels(picture: Picture, config: VisionConfig) -> np.ndarray:
    """Names what each patch shows: of the marks that cover a quarter of it or have their centre there, the largest.

    Args:
      picture: the picture.
      config: the cropping.

    Returns:
      [C, P * P] int32 from -1 to NUM_LABELS - 1, crops as in `image_features`: the global view, then tiles row by row.
      Patches that the tower masks as padding are -1; the global view has none of those, its white rim is background.
    """
    plan = plan_crops(*picture.image.size, config)
    patches, rows, columns = config.patches_per_side, plan.rows, plan.columns
    scale = np.array([plan.width / picture.image.width, plan.height / picture.image.height] * 2) / config.patch_size
    boxes = np.array([mark[1:] for mark in picture.marks]).reshape(-1, 4) * scale  # in patches of the tile grid
    labels = np.array([mark[0] for mark in picture.marks], np.int32)

    grid = _grid_labels(boxes, labels, rows * patches, columns * patches)
    grid[plan.visible_rows :] = IGNORED
    grid[:, plan.visible_columns :] = IGNORED
    tiles = grid.reshape(rows, patches, columns, patches).swapaxes(1, 2).reshape(-1, patches**2)
    view = _grid_labels(boxes / [columns, rows, columns, rows], labels, patches, patches)
    return np.concatenate([view.reshape(1, -1), tiles])


def patch_prints(picture: Picture, config: VisionConfig) -> np.ndarray:
    """Names the word or number of which each patch shows a part, or its figure's colour, as `patch_labels` does."""
    colours = [] if picture.figure is None else [picture.figure[0]]
    names = [word for word in picture.text.split() for _ in word] + colours
    marks = tuple((PRINTS.index(name), *box) for name, (_, *box) in zip(names, picture.marks, strict=True))
    return patch_labels(dataclasses.replace(picture, marks=marks), config)


def named_cells(picture: Picture, config: VisionConfig) -> list[tuple[int, str]]:
    """Where the image tokens say what the picture shows, once in each view, so that they read like typed words.

    A word is said where its first letter stands, a digit where it stands, a figure's colour in its first cell and its
    shape in the next.

    Returns:
      Cells, two by two patches, counted over all crops in the order of the image tokens; and what each says.
    """
    marks = tuple((i, *box) for i, (_, *box) in enumerate(picture.marks, start=1))
    numbered = patch_labels(dataclasses.replace(picture, marks=marks), config)
    cells = by_cell(numbered, config)
    said = []
    for view in (slice(config.tokens_per_crop), slice(config.tokens_per_crop, None)):  # the global view, the tiles
        where = [(view.start or 0) + np.flatnonzero((cells[view] == i).any(axis=1)) for i in range(1, len(marks) + 1)]
        if picture.figure is not None:
            said += [(int(where[0][min(i, len(where[0]) - 1)]), name) for i, name in enumerate(picture.figure)]
            continue
        first = 0
        for word in picture.text.split():
            letters = where[first : first + len(word)]
            first += len(word)
            for name, found in zip(word, letters, strict=True) if word.isdigit() else [(word, np.concatenate(letters))]:
                said += [(int(cell), name) for cell in found[:1]]
    return said


def by_cell(patches: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Values [C, P * P] of patches as [C * tokens_per_crop, 4], those of each two by two together."""
    side = config.tokens_per_side
    return patches.reshape(-1, side, 2, side, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)


def _grid_labels(
    boxes: np.ndarray,  # [M, 4], in patches
    labels: np.ndarray,  # [M] int32
    rows: int,
    columns: int,
) -> np.ndarray:  # [rows, columns] int32
    across, centre_across = _overlaps(boxes[:, 0], boxes[:, 2], columns)
    down, centre_down = _overlaps(boxes[:, 1], boxes[:, 3], rows)
    coverage = down[:, :, None] * across[:, None, :]
    counts = (coverage >= _COVERAGE) | (centre_down[:, :, None] & centre_across[:, None, :])
    # the background is the first candidate, with no coverage
    coverage = np.concatenate([np.zeros((1, rows, columns)), np.where(counts, coverage, 0.0)])
    return np.concatenate([[0], labels]).astype(np.int32)[coverage.argmax(0)]


def _overlaps(start: np.ndarray, end: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths [M, cells] that intervals share with each cell, and [M, cells] bool, where centres lie."""
    left = np.arange(cells)
    shared = np.minimum(end[:, None], left + 1) - np.maximum(start[:, None], left)
    return np.maximum(shared, 0.0), np.floor((start + end) / 2)[:, None] == left
