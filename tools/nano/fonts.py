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


@functools.cache
def fonts(held_out: bool = False) -> tuple[str, ...]:
    """Finds the fonts where the system keeps its own.

    Args:
      held_out: give those that are never used in training instead.

    Returns:
      Paths of TrueType files, in the order of the lists above.

    Raises:
      FileNotFoundError: some are not installed; without all of them the pictures would be others.
    """
    found = {name: _find(name) for name in (_HELD_OUT if held_out else _TRAINING)}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"fonts not found: {', '.join(missing)}; install the DejaVu and Liberation families "
            "(Debian: fonts-dejavu, fonts-liberation, and where it is apart fonts-liberation-sans-narrow)"
        )
    return tuple(found.values())


@functools.cache
def load(file: str, size: int) -> ImageFont.FreeTypeFont:
    """Opens a font at `size` pixels; the basic layout has no ligatures, so that each letter keeps a box of its own."""
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


def _find(name: str) -> str | None:
    try:
        return str(ImageFont.truetype(name).path)
    except OSError:
        return None
