"""The fonts of the printed words: free families that Linux distributions package, asked for by name."""

from __future__ import annotations

import functools

from PIL import ImageFont

_TRAINING = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf"),
    *("DejaVuSansCondensed.ttf", "DejaVuSansCondensed-Bold.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSerifCondensed.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf"),
    *("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSans-Italic.ttf"),
    *("LiberationSansNarrow-Regular.ttf", "LiberationSansNarrow-Bold.ttf"),
    *("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf", "LiberationSerif-Italic.ttf"),
)
_HELD_OUT = (
    *("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf", "LiberationMono-Italic.ttf"),
    *("DejaVuSerif-Bold.ttf", "DejaVuSansCondensed-BoldOblique.ttf", "LiberationSerif-BoldItalic.ttf"),
)
_FEWEST = 4


@functools.cache
def fonts(held_out: bool = False) -> tuple[str, ...]:
    """Finds the fonts where the system keeps its own, in the order of the lists above.

    Args:
      held_out: give those that are never used in training instead.

    Returns:
      Paths of TrueType files, at least four.

    Raises:
      FileNotFoundError: fewer are installed.
    """
    names = _HELD_OUT if held_out else _TRAINING
    found = tuple(path for path in map(_find, names) if path)
    if len(found) < _FEWEST:
        raise FileNotFoundError(
            f"{len(found)} of {len(names)} fonts found, at least {_FEWEST} are needed: install the DejaVu and "
            "Liberation families (Debian: fonts-dejavu, fonts-liberation)"
        )
    return found


@functools.cache
def load(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Opens a font at `size` pixels; the basic layout has no ligatures, so that each letter keeps a box of its own."""
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _find(name: str) -> str | None:
    try:
        return str(ImageFont.truetype(name).path)
    except OSError:
        return None
