"""Pictures to crops: decoding, and the dynamic-HD preprocessing (phi4mm-reference, sections 4.1 to 4.4).

A PIL image or an array is taken as the original takes one, by `convert("RGB")`: alpha is dropped, deep grey is clipped,
and EXIF is ignored, so results are equal. A file is opened as a viewer would show it: turned upright after its EXIF
orientation, transparency laid on white (the original shows whatever colour lies hidden there), deep grey scaled.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from phi4mm_jax.config import VisionConfig
from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.media import MediaLimits, describe, read
from phi4mm_jax.processing.prompt import ROW_SEPARATOR, VIEW_SEPARATOR, ImageFeatures, MediaError

IMAGE_SOURCES = "a path, a URL, bytes, a PIL image or an array"
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray
"""A path, a URL, the bytes of a file, a PIL image, or an array [H, W], [H, W, 3] or [H, W, 4]."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
"""Decoders that are used; some others of Pillow run external programs, or decode before they tell the size (ICO)."""
_MIN_SIDE = 10
"""Fewest pixels of the shorter side after scaling."""
_LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
"""Each uint8 value, normalised to -1 to 1."""
_CUBIC = -0.75
"""Coefficient of the bicubic kernel of the global view."""


# --- opening -------------------------------------------------------------------------------------------------


def load_image(source: ImageSource, limits: MediaLimits) -> Image.Image:
    """Opens a picture as RGB.

    Files, that is paths, URLs and bytes, are shown as a viewer would: turned upright after their EXIF orientation,
    transparency laid on white, deep grey scaled to 8 bits; animations give their first frame. PIL images and arrays
    are taken as the original takes images, by `convert("RGB")`, which drops alpha and clips deep grey. Arrays are
    uint8, or floats from 0 to 1.

    Raises:
      MediaError: not a picture, damaged or truncated, or of more pixels than the limit (found before decoding).
    """
    name = describe(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits).convert("RGB")
    if isinstance(source, Image.Image):
        check_pixels(source.size, name, limits)
        return _decoded(source, name, lambda image: image.convert("RGB"))
    data = read(source, limits, IMAGE_SOURCES)
    try:
        with warnings.catch_warnings():  # Pillow warns of large pictures; ours is the limit that counts
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_available_formats())
    except Image.DecompressionBombError:
        raise MediaError(f"{name}: image has more pixels than the limit of {limits.max_pixels}") from None
    except Exception:  # decoders raise anything on damaged headers
        raise MediaError(f"{name}: not an image, or damaged; accepted: {', '.join(_available_formats())}") from None
    check_pixels(image.size, name, limits)
    with image:
        return _decoded(image, name, _as_shown)


@functools.cache
def _available_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN)


def check_pixels(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    """Raises a MediaError if a picture of (width, height) has none or too many pixels."""
    if size[0] * size[1] > limits.max_pixels:
        raise MediaError(f"{name}: image of {size[0]}x{size[1]} exceeds the limit of {limits.max_pixels} pixels")
    if not size[0] * size[1]:
        raise MediaError(f"{name}: image has no pixels")


def _from_array(array: np.ndarray, limits: MediaLimits) -> Image.Image:
    pixels = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise MediaError(f"image array of shape {array.shape}; expected [H, W], [H, W, 3] or [H, W, 4]")
    check_pixels((pixels.shape[1], pixels.shape[0]), "image array", limits)
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN too
            raise MediaError("float image array with values outside 0 to 1")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise MediaError(f"image array of type {array.dtype}; expected uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _decoded(image: Image.Image, name: str, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # decoders raise anything on damaged data
        reason = shorten(error) or type(error).__name__
        raise MediaError(f"{name}: image cannot be decoded ({reason})") from error


def _as_shown(image: Image.Image) -> Image.Image:
    """Returns as RGB what a viewer would show of a file."""
    image = _upright(image)
    if image.mode[0] in "IF":
        return _grey_to_8bit(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing of the orientation; the pixels are fine
        return image


def _grey_to_8bit(image: Image.Image) -> Image.Image:
    """Scales deep grey: modes I;16* from 16 bits, I and F from the smallest usual range that holds the values."""
    values = np.asarray(image).astype(np.float64)
    ceilings = {"I": (255.0, 65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    peak = values.max()
    ceiling = next((c for c in ceilings if peak <= c), None)
    if ceiling is None or not np.isfinite(values).all():
        raise ValueError(f"mode {image.mode} with values up to {peak:g}; expected finite ones up to {ceilings[-1]:g}")
    return Image.fromarray(np.rint(np.maximum(values, 0.0) * (255.0 / ceiling)).astype(np.uint8))


# --- the plan ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CropPlan:
    """How one picture is scaled, padded and cut."""

    columns: int
    """Tiles side by side."""
    rows: int
    """Tiles one above the other."""
    width: int
    """Width of the scaled picture, in pixels; white padding follows on the right."""
    height: int
    """Height of the scaled picture, in pixels; white padding follows below."""
    visible_columns: int
    """Patches of the grid, from the left, that are not padding throughout."""
    visible_rows: int
    """Patches of the grid, from the top, that are not padding throughout."""


def plan_crops(width: int, height: int, config: VisionConfig) -> CropPlan:
    """Chooses the tile grid of a picture and the size that it is scaled to.

    Raises:
      MediaError: the picture is so long and thin that hardly a pixel of its shorter side would be left.
    """
    side = config.image_size
    columns, rows = _choose_grid(width, height, side, config.max_crops)
    full_width, full_height = columns * side, rows * side
    ratio_x, ratio_y = full_width / width, full_height / height
    if ratio_x < ratio_y:
        new_width, new_height = full_width, int(height * ratio_x)
    else:
        new_width, new_height = int(width * ratio_y), full_height
    if min(new_width, new_height) < _MIN_SIDE:
        raise MediaError(
            f"image of {width}x{height} is too long and thin: scaled to {new_width}x{new_height}, at least {_MIN_SIDE} "
            "pixels are needed on each side"
        )
    return CropPlan(
        columns,
        rows,
        new_width,
        new_height,
        visible_columns=columns * config.patches_per_side - (full_width - new_width) // config.patch_size,
        visible_rows=rows * config.patches_per_side - (full_height - new_height) // config.patch_size,
    )


def _choose_grid(width: int, height: int, side: int, max_crops: int) -> tuple[int, int]:
    """Returns (columns, rows): the grid that covers the picture, or if that is too many tiles, the nearest shape."""
    best = math.ceil(width / side), math.ceil(height / side)
    if best[0] * best[1] <= max_crops:
        return best
    nearest = math.inf
    for columns, rows in _grids(max_crops):
        distance = abs(width / height - columns / rows)
        # among grids of equal shape the largest that the picture fills at least half
        if distance < nearest or (distance == nearest and width * height > 0.5 * side * side * columns * rows):
            nearest, best = distance, (columns, rows)
    return best


@functools.cache
def _grids(max_crops: int) -> list[tuple[int, int]]:
    """All grids of at most `max_crops` tiles, by increasing number of tiles."""
    sides = range(1, max_crops + 1)
    return sorted(((i, j) for i in sides for j in sides if i * j <= max_crops), key=lambda grid: grid[0] * grid[1])


# --- the features --------------------------------------------------------------------------------------------


def image_features(image: Image.Image, config: VisionConfig) -> ImageFeatures:
    """Cuts an RGB picture into crops and lays out its tokens.

    Raises:
      MediaError: the picture is too long and thin.
    """
    plan = plan_crops(*image.size, config)
    side, patches = config.image_size, config.patches_per_side
    rows, columns = plan.rows, plan.columns
    padded = np.full((rows * side, columns * side, 3), 255, np.uint8)
    padded[: plan.height, : plan.width] = image.resize((plan.width, plan.height), Image.Resampling.BILINEAR)

    crops = np.empty((1 + rows * columns, 3, side, side), np.float32)
    crops[0] = _global_view(padded, side).transpose(2, 0, 1)
    tiles = padded.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    np.take(_LEVELS, tiles, out=crops[1:].reshape(tiles.shape), mode="clip")

    grid_mask = np.zeros((rows * patches, columns * patches), bool)
    grid_mask[: plan.visible_rows, : plan.visible_columns] = True
    tile_masks = grid_mask.reshape(rows, patches, columns, patches).swapaxes(1, 2).reshape(-1, patches, patches)
    mask = np.concatenate([np.ones((1, patches, patches), bool), tile_masks])
    layout = token_layout(plan, config.tokens_per_side)
    return ImageFeatures(crops, mask, patch_position_ids(mask), layout)


def token_layout(plan: CropPlan, side: int) -> np.ndarray:  # [N] int32
    """Orders the tokens of a picture: visible rows of the tile grid, a separator, rows of the global view.

    Args:
      plan: the cut.
      side: tokens along one side of a crop.
    """
    row = np.arange(math.ceil(plan.visible_rows / 2), dtype=np.int32)[:, None]
    column = np.arange(math.ceil(plan.visible_columns / 2), dtype=np.int32)
    tile = 1 + row // side * plan.columns + column // side
    tiles = (tile * side + row % side) * side + column % side
    view = np.arange(side * side, dtype=np.int32).reshape(side, side)
    tiles, view = (np.pad(x, ((0, 0), (0, 1)), constant_values=ROW_SEPARATOR).ravel() for x in (tiles, view))
    return np.concatenate([tiles, [VIEW_SEPARATOR], view], dtype=np.int32)


def patch_position_ids(
    mask: np.ndarray,  # [C, P, P] bool, the visible patches a rectangle at the top left
) -> np.ndarray:  # [C, P * P] int32
    """Looks up each visible patch's row of the position table; padding has id 0 (section 4.3)."""
    patches = mask.shape[1]
    ids = np.zeros(mask.shape, np.int32)
    for crop, visible in zip(ids, mask, strict=True):
        rows, columns = _buckets(visible[:, 0].sum(), patches), _buckets(visible[0].sum(), patches)
        crop[: len(rows), : len(columns)] = rows[:, None] * patches + columns
    return ids.reshape(len(mask), -1)


@functools.cache
def _buckets(visible: int, patches: int) -> np.ndarray:  # [visible] int32
    """Bucket k of `patches` for each of `visible` coordinates in [0, 1).

    In exact numbers that is floor(patches * i / visible). The original takes a float32 linspace, filled from both ends,
    whose rounding puts a few coordinates just below a boundary; the same is done here.
    """
    end = np.float32(1) - np.float32(1) / np.float32(max(visible, 1))
    step = end / np.float32(max(visible - 1, 1))
    index = np.arange(visible, dtype=np.float32)
    coordinates = np.where(index < visible // 2, step * index, end - step * index[::-1])
    boundaries = np.arange(1, patches) / patches
    return np.searchsorted(boundaries.astype(np.float32), coordinates, side="right").astype(np.int32)


def _global_view(
    padded: np.ndarray,  # [rows * S, columns * S, 3] uint8
    side: int,
) -> np.ndarray:  # [S, S, 3] float32
    """Squeezes the whole padded picture into one crop: bicubic, without antialiasing and without clamping."""
    taps, weights = _bicubic_taps(padded.shape[0], side)
    squeezed = sum(w[:, None, None] * _LEVELS[padded[t]] for t, w in zip(taps, weights, strict=True))
    taps, weights = _bicubic_taps(padded.shape[1], side)
    return sum(w[:, None] * squeezed[:, t] for t, w in zip(taps, weights, strict=True))


def _bicubic_taps(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source indices [4, new_size] and weights [4, new_size] float32 along one axis."""
    position = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    taps = np.floor(position) + np.arange(-1, 3)[:, None]
    distance = np.abs(position - taps)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance <= 1, near, far)
    return np.clip(taps, 0, size - 1).astype(np.intp), weights.astype(np.float32)
